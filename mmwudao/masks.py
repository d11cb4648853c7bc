"""Which part of a picture stays when the rest is drawn anew: a share of a side, or a mask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.images import to_rgb, to_rgba
from mmwudao.tasks import read_pictures

CELL = 8  # pixels of a mask that are looked at along each side of a code
OPAQUE = WHITE = 128
MASK_LIKE = 0.99  # of the opaque pixels of a mask are black or white


@dataclass(frozen=True)
class Kept:
    """What stays of a picture: `cells`, the codes (bool [h, w]), and `pixels`, bool [size, size]."""

    cells: Tensor
    pixels: NDArray[numpy.bool_]


def find_kept(
    keep: str | Path | Image.Image, grid: tuple[int, int], size: int, picture: Image.Image | None = None
) -> Kept:
    """What stays: `top:0.5`, `left:0.5`, or the white pixels of a mask (a file, or a picture).

    What is transparent in a mask is erased: it is drawn anew. The mask of a `picture` has its shape, and its centre
    square counts as that of the picture does, or it is square and tells of the centre square alone. A code stays if
    all of its pixels do. Raises `ValueError` for anything else, and where nothing is to be drawn, or no code stays.
    """
    height, width = grid
    side, _, share = str(keep).partition(":")
    if isinstance(keep, str) and side in ("top", "left") and share:
        count = side_codes("keep", keep, grid)
        cells = torch.zeros(grid, dtype=torch.bool)
        cells[(slice(count),) if side == "top" else (slice(None), slice(count))] = True
        return Kept(cells, pixels_of_cells(cells, size))
    if isinstance(keep, str) and not Path(keep).is_file():
        raise ValueError(f"keep {keep!r}: say top:0.5, left:0.5, or name a mask picture whose white part stays")
    mask = to_rgba(keep) if isinstance(keep, Image.Image) else read_pictures([Path(keep)], alpha=True)[0]
    picture = None if picture is None else to_rgb(picture)
    kept = Image.fromarray(_kept_pixels(mask, picture))
    box, nearest = _centre_square(kept, picture), Image.Resampling.NEAREST
    fine = numpy.asarray(kept.resize((width * CELL, height * CELL), nearest, box=box))
    cells = torch.from_numpy(fine.reshape(height, CELL, width, CELL).all(axis=(1, 3)))
    if cells.all():
        raise ValueError("the mask must leave something to draw (black or transparent): it keeps the whole picture")
    if not cells.any():
        raise ValueError("the mask must leave something to keep (white): it hides some of every code of the picture")
    return Kept(cells, numpy.asarray(kept.resize((size, size), nearest, box=box)))


def check_completes(cells: Tensor) -> None:
    """`ValueError` for `cells` to keep (bool [h, w]) that a model cannot complete that was not trained to fill holes.

    It draws a code in sight of what comes before it in raster order, so that it could not fit what is kept behind it:
    what stays must be a start in raster order, or a left part.
    """
    raster = bool(cells.flatten()[: int(cells.sum())].all())
    left = bool((cells == cells[:1]).all()) and bool(cells[0, : int(cells[0].sum())].all())
    if not (raster or left):
        raise ValueError(
            "this model cannot complete that: it was not trained to fill holes but draws row by row from the top left, "
            "so what stays must be the picture's top or its left part"
        )


def side_codes(option: str, told: str, grid: tuple[int, int]) -> int:
    """How many rows or columns of codes SIDE:SHARE means, some but not all. Raises `ValueError` that names `option`."""
    side, _, share = told.partition(":")
    most = grid[0] if side in ("top", "bottom") else grid[1]
    try:
        part = float(share)
    except ValueError as error:
        raise ValueError(f"{option} {told!r}: a share is a number such as 0.5") from error
    count = round(part * most) if 0 < part < 1 else 0
    if not 0 < count < most:
        raise ValueError(f"{option} {told!r}: the share must leave something to keep and something to draw")
    return count


def pixels_of_cells(cells: Tensor, size: int) -> NDArray[numpy.bool_]:
    """Bool [size, size] of bool [h, w]."""
    picture = Image.fromarray(cells.numpy()).resize((size, size), Image.Resampling.NEAREST)
    return numpy.asarray(picture)


def _kept_pixels(mask: Image.Image, picture: Image.Image | None) -> NDArray[numpy.bool_]:
    """Which pixels [H, W] of a mask say that the picture stays: the white ones that are not erased.

    A picture with a hole is a mask too: all that is left of it stays, whatever its colours.
    """
    white = numpy.asarray(mask.convert("RGB").convert("L")) >= WHITE
    if mask.mode != "RGBA":
        return white
    left = numpy.asarray(mask)[..., 3] >= OPAQUE
    colours = numpy.asarray(mask.convert("RGB"))[left]  # [n, 3]
    if left.all() or not len(colours):
        return white & left
    lightness = colours.mean(axis=1)
    plain = (numpy.ptp(colours, axis=1) < 32) & ((lightness < 64) | (lightness > 191))
    same = picture is not None and picture.size == mask.size and (numpy.asarray(picture)[left] == colours).all()
    return left if same or plain.mean() < MASK_LIKE else white & left


def _centre_square(mask: Image.Image, picture: Image.Image | None) -> tuple[float, float, float, float]:
    """The box of a mask over the part of the picture that is used. Raises `ValueError` for a mask of another shape."""
    width, height = mask.size
    if picture is None:
        return 0, 0, width, height
    # as of one shape count sizes that differ by the rounding of one pixel
    same_shape = abs(width * picture.height - height * picture.width) <= max(*mask.size, *picture.size)
    if width != height and not same_shape:
        raise ValueError(
            f"the mask has {width}x{height} pixels and the picture {picture.width}x{picture.height}: give a mask of "
            "the picture's shape, or a square one for its centre square"
        )
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
