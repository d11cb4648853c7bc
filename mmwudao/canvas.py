"""A picture that is to be completed: what of it the model is given, and how what it draws is put back.

All pixels that were not to be drawn anew stay the user's own: those of the drawing, which went through the image
tokenizer, replace no others, but for a seam a few pixels wide in which the two fade into each other.

Shapes: h x w codes; S pixels, the side of the model's pictures.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from data.images import to_rgb, to_square
from generation.drawing.decoding import known_codes
from generation.rows.holes import hidden_codes
from mmwudao.masks import check_completes, find_kept, pixels_of_cells, side_codes

SIDES = ("left", "right", "top", "bottom")
SEAM = 3  # pixels


@dataclass(frozen=True)
class CanvasFormat:
    """What a model fixes about the pictures that it completes: S, the codes of a picture, `TransformerConfig.fills`."""

    size: int
    grid: tuple[int, int]
    fills: bool


@dataclass(frozen=True, eq=False)
class Canvas:
    """A picture (RGB, S x S) whose codes `kept` (bool [h, w]) are given, and whose pixels `own` (bool [S, S]) stay.

    `told` is the note of the result on what was kept. What was drawn is put at `offset` on `beneath`, a larger picture,
    if there is one. A canvas is equal only to itself: pictures of one request are drawn together.
    """

    picture: Image.Image
    kept: Tensor
    own: NDArray[numpy.bool_]
    told: str
    fills: bool
    beneath: Image.Image | None = None
    offset: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        """Raises `ValueError` for what the model cannot complete."""
        if not self.fills:
            check_completes(self.kept)

    @property
    def known(self) -> int:
        """How many codes take no step."""
        return known_codes(self.kept, self.fills)

    def finish(self, drawn: Image.Image) -> Image.Image:
        """The completed picture, from what the model drew (RGB, S x S)."""
        whole = self.picture.copy()
        whole.paste(drawn, mask=seam(~self.own))
        if self.beneath is None:
            return whole
        larger = self.beneath.copy()
        larger.paste(whole, self.offset)
        return larger

    def preview(self, drawn: Image.Image, known: Tensor) -> Image.Image:
        """As `finish`, while only the codes `known` (bool [h, w]) are right: white where nothing is drawn yet."""
        unknown = pixels_of_cells(~known, drawn.width)
        drawn = drawn.copy()
        drawn.paste("white", mask=Image.fromarray(unknown))
        return self.finish(drawn)


def masked_canvas(model: CanvasFormat, image: Image.Image, keep: str | Path | Image.Image) -> Canvas:
    """The centre square of a picture, of which what `keep` says stays (`masks.find_kept`). Raises `ValueError`."""
    kept = find_kept(keep, model.grid, model.size, image)
    square = to_square(to_rgb(image), model.size)
    return Canvas(square, kept.cells, kept.pixels, keep if isinstance(keep, str) else "a mask", model.fills)


def extended_canvas(model: CanvasFormat, image: Image.Image, extend: str) -> Canvas:
    """The centre square of a picture, which is to go on at one side by a share of itself, as in `left:0.25`.

    The model is given the nearer part of the square, moved away from that side. Raises `ValueError`.
    """
    side = extend.partition(":")[0]
    if side not in SIDES or ":" not in extend:
        raise ValueError(
            f"extend {extend!r}: say a side and a share, as in left:0.25; the sides are {', '.join(SIDES)}"
        )
    square, size = to_square(to_rgb(image), model.size), model.size
    before, across = side in ("left", "top"), side in ("left", "right")
    count, axis = side_codes("extend", extend, model.grid), 1 if across else 0
    pixels = count * size // model.grid[axis]
    move = pixels if before else -pixels
    # what is not known yet continues the edge: codes beside it are read with it in sight
    edge = {
        "left": (0, 0, 1, size),
        "right": (size - 1, 0, size, size),
        "top": (0, 0, size, 1),
        "bottom": (0, size - 1, size, size),
    }[side]
    window = square.crop(edge).resize((size, size))
    window.paste(square, (move, 0) if across else (0, move))
    cells = torch.zeros(model.grid, dtype=torch.bool)
    span = slice(count, None) if before else slice(-count)
    cells[(slice(None), span) if across else (span,)] = True
    beneath = Image.new("RGB", (size + pixels * across, size + pixels * (not across)))
    ahead = (pixels, 0) if across else (0, pixels)
    beneath.paste(square, ahead if before else (0, 0))
    own, place = pixels_of_cells(cells, size), (0, 0) if before else ahead
    return Canvas(window, cells, own, f"all, extended {extend}", model.fills, beneath, place)


def varied_canvas(model: CanvasFormat, image: Image.Image, strength: float, seed: int) -> Canvas:
    """The centre square of a picture, of which a share `strength` of the codes (at most 1) is to be drawn anew.

    Squares of codes chosen by `seed`, or its lower part for a model that does not fill holes. Nothing is kept as
    pixels: all of it went through the tokenizer, so that no pattern of what was kept can be seen.
    """
    count = max(1, round(strength * model.grid[0] * model.grid[1]))
    hidden = torch.zeros(model.grid[0] * model.grid[1], dtype=torch.bool)
    hidden[len(hidden) - count :] = True
    hidden = hidden.view(model.grid)
    if model.fills:
        hidden = hidden_codes(model.grid, "patches", strength, random.Random(seed))
    square = to_square(to_rgb(image), model.size)
    none = numpy.zeros((model.size, model.size), dtype=bool)
    return Canvas(square, ~hidden, none, f"all but {strength:g}", model.fills)


def seam(drawn: NDArray[numpy.bool_]) -> Image.Image:
    """How much of the drawing is seen at each pixel ("L"): all of it where `drawn`, less and less `SEAM` pixels around.

    What lies inside may be what the user wants to be rid of: it is not to shine through.
    """
    grown = Image.fromarray(drawn).convert("L")
    weight = numpy.asarray(grown).astype(numpy.int64)
    for step in range(1, SEAM + 1):
        grown = grown.filter(ImageFilter.MaxFilter(3))
        share = 255 * (SEAM + 1 - step) // (SEAM + 1)
        weight = numpy.maximum(weight, numpy.asarray(grown).astype(numpy.int64) * share // 255)
    return Image.fromarray(weight.astype(numpy.uint8))
