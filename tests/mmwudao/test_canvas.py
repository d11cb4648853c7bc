"""Completing pictures: masks of any form, pictures that go on beyond a side, seams, and what a model refuses."""

from __future__ import annotations

import io

import numpy
import pytest
import torch
from PIL import Image, ImageDraw

from mmwudao.canvas import SEAM, CanvasFormat, extended_canvas, masked_canvas, seam, varied_canvas
from mmwudao.pipeline import DrawingProgress, Pipeline, load

FILLS = CanvasFormat(32, (4, 4), True)
ROWS = CanvasFormat(32, (4, 4), False)


def noise(size=(32, 32), seed=0) -> Image.Image:
    pixels = numpy.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def painted(box, mode="RGBA", size=(32, 32)) -> Image.Image:
    """A mask in which `box` is to be drawn: transparent as OpenAI's, or black."""
    mask = Image.new(mode, size, "white")
    hole = (0, 0, 0, 0) if mode == "RGBA" else "black"
    ImageDraw.Draw(mask).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), hole)
    return mask


def distance(drawn: numpy.ndarray) -> numpy.ndarray:
    """How many pixels it is to the next drawn one, along the longer axis."""
    rows, columns = numpy.nonzero(drawn)
    y, x = numpy.mgrid[: drawn.shape[0], : drawn.shape[1]]
    return numpy.maximum(abs(y[..., None] - rows), abs(x[..., None] - columns)).min(axis=-1)


@pytest.fixture(scope="module")
def pipe(filling_model_dir) -> Pipeline:
    return load(filling_model_dir, device="cpu", dtype="float32")


# what is kept


@pytest.mark.parametrize("mode", ["RGBA", "L", "RGB"])
def test_a_hole_anywhere(mode):
    canvas = masked_canvas(FILLS, noise(), painted((9, 8, 20, 15), mode))
    expected = torch.ones(4, 4, dtype=torch.bool)
    expected[1, 1:3] = False
    assert torch.equal(canvas.kept, expected)
    own = numpy.ones((32, 32), dtype=bool)
    own[8:15, 9:20] = False
    assert (canvas.own == own).all()  # by pixels, not by codes
    assert canvas.known == 14


def test_a_jpeg_is_a_mask_too():
    buffer = io.BytesIO()
    painted((8, 8, 24, 16), "RGB").save(buffer, "JPEG", quality=40)
    canvas = masked_canvas(FILLS, noise(), Image.open(buffer))
    assert int(canvas.kept.sum()) == 14


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (painted((0, 0, 32, 32)), "the mask must leave something to keep"),
        (painted((0, 0, 32, 32), "L"), "the mask must leave something to keep"),
        (Image.new("RGBA", (32, 32), "white"), "something to draw .*it keeps the whole picture"),
        (Image.new("L", (32, 32), 255), "something to draw"),
        (painted((8, 8, 16, 16), size=(48, 32)), "the mask has 48x32 pixels and the picture 32x32"),
        ("no-such-file.png", "name a mask picture"),
    ],
    ids=lambda value: "",
)
def test_bad_masks_are_told_in_one_line(keep, message):
    with pytest.raises(ValueError, match=message) as error:
        masked_canvas(FILLS, noise(), keep)
    assert "\n" not in str(error.value)


def test_a_model_that_draws_row_by_row_keeps_the_top_or_the_left():
    with pytest.raises(ValueError, match="not trained to fill holes .*top or its left"):
        masked_canvas(ROWS, noise(), painted((9, 8, 20, 15)))
    assert masked_canvas(ROWS, noise(), painted((0, 16, 32, 32))).known == 8
    assert masked_canvas(ROWS, noise(), "left:0.5").known == 2
    assert masked_canvas(FILLS, noise(), "left:0.5").known == 8
    for side in ("left", "top"):
        with pytest.raises(ValueError, match="not trained to fill holes"):
            extended_canvas(ROWS, noise(), f"{side}:0.25")
    assert extended_canvas(ROWS, noise(), "bottom:0.25").known == 12


# beyond a side


@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_a_picture_that_goes_on_keeps_its_pixels(side):
    picture = noise()
    canvas = extended_canvas(FILLS, picture, f"{side}:0.25")
    assert canvas.known == 12
    done = canvas.finish(Image.new("RGB", (32, 32), "red"))
    across, before = side in ("left", "right"), side in ("left", "top")
    assert done.size == ((40, 32) if across else (32, 40))
    whole, shown = (numpy.asarray(x if across else x.transpose(Image.Transpose.TRANSPOSE)) for x in (done, picture))
    window = numpy.asarray(canvas.picture if across else canvas.picture.transpose(Image.Transpose.TRANSPOSE))
    new, kept = (whole[:, :8], whole[:, 8:]) if before else (whole[:, -8:], whole[:, :32])
    assert (new == (255, 0, 0)).all()
    if before:
        assert (kept[:, SEAM:] == shown[:, SEAM:]).all()
        assert (window[:, 8:] == shown[:, :24]).all()
    else:
        assert (kept[:, :-SEAM] == shown[:, :-SEAM]).all()
        assert (window[:, :24] == shown[:, 8:]).all()


@pytest.mark.parametrize("extend", ["left", "middle:0.5", "left:x", "left:0", "left:1", "top:nan", "left:0.01", ":0.5"])
def test_a_bad_side_is_told_in_one_line(extend):
    with pytest.raises(ValueError, match="extend") as error:
        extended_canvas(FILLS, noise(), extend)
    assert "\n" not in str(error.value)


# putting back


def test_the_seam_fades_outside_of_what_is_drawn():
    drawn = numpy.zeros((32, 32), dtype=bool)
    drawn[10:20, 12:16] = drawn[25, 25] = True
    weights = numpy.asarray(seam(drawn))
    away = distance(drawn)
    assert (weights[drawn] == 255).all()
    assert (weights[away > SEAM] == 0).all()
    assert sorted(set(weights.flatten().tolist())) == [0, 63, 127, 191, 255]
    assert (numpy.diff([int(weights[away == d][0]) for d in range(SEAM + 2)]) < 0).all()


def test_pixels_outside_of_the_mask_stay_the_users_own(pipe):
    picture, mask = noise(), painted((9, 8, 20, 15))
    hole = numpy.asarray(mask)[..., 3] == 0
    first, second = pipe.complete(picture, "红心", mask, n=2, seed=3)
    for image in (first, second):
        same = (numpy.asarray(image) == numpy.asarray(picture)).all(axis=2)
        assert same[distance(hole) > SEAM].all()
        assert not same[hole].any() or same[hole].mean() < 0.05
        assert image.info["kept"] == "a mask"
    assert first.tobytes() != second.tobytes()
    assert pipe.complete(picture, "红心", mask, n=1, seed=4)[0].tobytes() == second.tobytes()


def test_only_the_holes_take_steps_and_previews_show_them(pipe):
    told: list[DrawingProgress] = []
    pipe.complete(noise(), "红心", painted((9, 8, 20, 15)), on_progress=told.append)
    assert [(one.done, one.total) for one in told] == [(1, 2), (2, 2)]
    told.clear()
    shown = []
    pipe.complete(noise(), "红心", painted((0, 16, 32, 32)), on_progress=lambda p: shown.append(p.preview()[0]))
    assert len(shown) == 8
    assert shown[0].getpixel((31, 31)) == (255, 255, 255)
    assert shown[0].getpixel((5, 5)) == noise().getpixel((5, 5))


def test_a_picture_larger_than_itself(pipe):
    (image,) = pipe.complete(noise((64, 64)), "红心", extend="left:0.5", seed=1)
    assert image.size == (48, 32)
    assert image.info["kept"] == "all, extended left:0.5"


def test_variations_keep_less_the_stronger_they_are(pipe):
    known = [varied_canvas(FILLS, noise(), strength, 1).known for strength in (0.1, 0.5, 1.0)]
    assert known == [14, 8, 0]
    assert varied_canvas(ROWS, noise(), 0.5, 1).known == 8
    one, other = (varied_canvas(CanvasFormat(64, (8, 8), True), noise(), 0.5, seed).kept for seed in (1, 2))
    assert not torch.equal(one, other)
    drawings = pipe.plan("红心", seed=1)
    (image,) = pipe.draw(drawings, canvas=varied_canvas(FILLS, noise(), 1.0, 1))
    assert image.tobytes() == pipe.generate("红心", seed=1)[0].tobytes()
