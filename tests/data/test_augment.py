"""Other views of pictures: how they are drawn, what they show, and which may be mirrored."""

import numpy
import pytest
from PIL import Image

from data.augment import PictureView, draw_view, may_be_mirrored, view_square
from data.sample import Caption, Sample


def named(name: str, *keywords: str, language: str = "en") -> Sample:
    return Sample(f"s-{name}", None, "", {language: Caption(name, keywords)})


def spot(at: tuple[int, int], size: int = 64) -> Image.Image:
    """A black square of 8 x 8 pixels on white, its upper left corner at `at` (x, y)."""
    image = Image.new("RGB", (size, size), "white")
    image.paste((0, 0, 0), (*at, at[0] + 8, at[1] + 8))
    return image


def centre(image: Image.Image) -> tuple[float, float]:
    """Where the dark pixels lie, in pixels from the left and from the top."""
    dark = 255.0 - numpy.asarray(image.convert("L")).astype(float)
    ys, xs = numpy.mgrid[: dark.shape[0], : dark.shape[1]] + 0.5
    return (dark * xs).sum() / dark.sum(), (dark * ys).sum() / dark.sum()


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (PictureView(0, 0, 1, False), (20, 28)),
        (PictureView(0, 0, 1, True), (44, 28)),
        (PictureView(1 / 16, -1 / 16, 1, False), (16, 32)),
        (PictureView(0, 0, 0.5, False), (8, 24)),
        (PictureView(0, 0, 1.25, False), (32 - 12 / 1.25, 32 - 4 / 1.25)),
    ],
)
def test_a_view_shows_what_it_says(view, expected):
    assert centre(view_square(spot((16, 24)), 64, view)) == pytest.approx(expected, abs=0.2)


def test_edges_go_on_and_pictures_of_any_shape_are_squares():
    blue = Image.new("RGB", (90, 50), (0, 0, 200))
    found = view_square(blue, 16, PictureView(0.06, 0.06, 1.18, True))
    assert found.size == (16, 16)
    assert (numpy.asarray(found) == (0, 0, 200)).all()


def test_views_are_decided_by_the_sample_and_the_number():
    cat = named("cat")
    views = [draw_view(cat, number) for number in range(200)]
    assert views == [draw_view(cat, number) for number in range(200)]
    assert len(set(views)) == 200
    assert 60 < sum(view.mirrored for view in views) < 140
    assert all(abs(view.right) <= 0.06 and abs(view.down) <= 0.06 and 0.9 < view.side < 1.18 for view in views)
    assert draw_view(named("dog"), 0) != views[0]
    assert not any(draw_view(named("left arrow"), number).mirrored for number in range(50))


@pytest.mark.parametrize("name", ["cat", "red heart", "sleeping face", "brightness", "frog", "猫", "赤いりんご"])
def test_what_may_be_mirrored(name):
    assert may_be_mirrored(named(name))


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("left arrow", "en"),
        ("person walking: facing right", "en"),
        ("flag: Germany", "en"),
        ("keycap: 3", "en"),
        ("OK button", "en"),
        ("twelve o’clock", "en"),
        ("chart increasing", "en"),
        ("heavy dollar sign", "en"),
        ("向左的箭头", "zh"),
        ("Pfeil nach links", "de"),
        ("flèche gauche", "fr"),
        ("šipka doleva", "cs"),
        ("矢印", "ja"),
        ("왼쪽 화살표", "ko"),
    ],
)
def test_what_may_not_be_mirrored(name, language):
    assert not may_be_mirrored(named(name, language=language))
    assert not may_be_mirrored(Sample("a", None, "", {"en": Caption("thing"), language: Caption(name)}))


def test_a_keyword_is_enough_and_no_caption_says_nothing():
    assert not may_be_mirrored(named("pointer", "arrow"))
    assert not may_be_mirrored(Sample("a", None, ""))
