"""Masks: cropped as their picture is, and erased where they are transparent."""

from __future__ import annotations

import pytest
from PIL import Image, ImageDraw

from mmwudao.masks import find_kept

GRID = (8, 8)


def mask(size=(64, 64), white=(0, 0, 32, 64), mode="L", ground="black", fill="white") -> Image.Image:
    made = Image.new(mode, size, ground)
    if white:
        ImageDraw.Draw(made).rectangle((white[0], white[1], white[2] - 1, white[3] - 1), fill)
    return made


def kept_cells(keep, grid, picture=None):
    return find_kept(keep, grid, 64, picture).cells


def columns(keep, picture=None) -> list[bool]:
    cells = kept_cells(keep, GRID, picture)
    assert (cells == cells[:1]).all()
    return cells[0].tolist()


LEFT_HALF = [True] * 4 + [False] * 4


def test_a_mask_is_cropped_as_its_picture_is():
    wide = Image.new("RGB", (128, 64))
    assert columns(mask((128, 64), (0, 0, 64, 64)), wide) == LEFT_HALF  # the centre square begins at 32
    assert columns(mask((64, 64)), wide) == LEFT_HALF  # of the centre square alone
    assert columns(mask((256, 128), (0, 0, 128, 128)), wide) == LEFT_HALF  # of another scale
    assert kept_cells(mask((64, 128), (0, 0, 64, 64)), GRID, Image.new("RGB", (64, 128)))[:, 0].tolist() == LEFT_HALF
    with pytest.raises(ValueError, match="must leave something to keep"):
        kept_cells(mask((128, 64), (0, 0, 32, 64)), GRID, wide)  # all white is cropped away


@pytest.mark.parametrize(("size", "shape"), [((64, 128), "64x128"), ((100, 64), "100x64")])
def test_a_mask_of_another_shape_is_refused(size, shape):
    with pytest.raises(ValueError, match=f"the mask has {shape} pixels and the picture 128x64"):
        kept_cells(mask(size), GRID, Image.new("RGB", (128, 64)))


def test_what_is_transparent_is_erased():
    erased = mask(mode="RGBA", ground="white", fill=(255, 255, 255, 255), white=None)
    ImageDraw.Draw(erased).rectangle((32, 0, 63, 63), (255, 255, 255, 0))
    assert columns(erased) == LEFT_HALF  # white over erased
    assert columns(mask(mode="RGBA", ground=(0, 0, 0, 0))) == LEFT_HALF  # strokes on an empty layer
    assert columns(mask(mode="RGBA", ground=(255, 255, 255, 0))) == LEFT_HALF
    assert columns(mask(mode="LA", ground=(0, 0), fill=(255, 255))) == LEFT_HALF
    both = mask(mode="RGBA", ground="black", white=(0, 0, 48, 64))
    ImageDraw.Draw(both).rectangle((32, 0, 47, 63), (255, 255, 255, 0))
    assert columns(both) == LEFT_HALF  # black is drawn anew, too


@pytest.mark.parametrize("colour", ["red", "black", "white", (40, 90, 200)])
def test_a_picture_with_a_hole_keeps_the_rest(colour):
    picture = Image.new("RGB", (64, 64), colour)
    picture.putpixel((3, 3), (200, 30, 30))
    hole = picture.convert("RGBA")
    ImageDraw.Draw(hole).rectangle((32, 0, 63, 63), (0, 0, 0, 0))
    assert columns(hole, picture) == LEFT_HALF
    assert columns(hole, hole) == LEFT_HALF


def test_a_palette_with_a_transparent_colour(tmp_path):
    hole = mask(mode="RGBA", ground=(255, 255, 255, 0)).quantize(4)
    hole.save(tmp_path / "mask.png")
    assert columns(str(tmp_path / "mask.png")) == LEFT_HALF
