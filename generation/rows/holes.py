"""Which codes of a picture are hidden: masks of four kinds, drawn by chance.

Each kind gives every code a score, and those with the highest scores are hidden, so that any share of them can be.
Shapes: h x w codes in a picture.
"""

from __future__ import annotations

import random
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

HoleKind = Literal["patches", "box", "half_plane", "blobs"]
PATCH = 4  # codes a side, as in CogLM (Ding et al. 2022, arXiv:2204.14217, section 3)
LEAST_SHARE = 0.1


def draw_holes(grid: tuple[int, int], rng: random.Random) -> Tensor:
    """The hidden codes (bool [h, w]) of a training row: of any kind, a share from `LEAST_SHARE` to all of them."""
    return hidden_codes(grid, rng.choice(get_args(HoleKind)), rng.uniform(LEAST_SHARE, 1), rng)


def hidden_codes(grid: tuple[int, int], kind: HoleKind, share: float, rng: random.Random) -> Tensor:
    """Bool [h, w]: that `share` of the codes, at least one, hidden as `kind` says.

    "patches": squares of `PATCH` codes, the last one in part; "box": a rectangle; "half_plane": one side of a line;
    "blobs": spots of any shape.
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    scores = {"patches": _patches, "box": _box, "half_plane": _half_plane, "blobs": _blobs}[kind](grid, generator)
    count = grid[0] * grid[1]
    hidden = torch.zeros(count, dtype=torch.bool)
    hidden[scores.flatten().topk(max(1, round(share * count))).indices] = True
    return hidden.view(grid)


def _patches(grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    height, width = grid
    top, left = torch.randint(PATCH, (2,), generator=generator).tolist()
    scores = torch.rand(-(-height // PATCH) + 1, -(-width // PATCH) + 1, generator=generator)
    whole = scores.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
    return whole[top : top + height, left : left + width]


def _box(grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    row, column, stretch = torch.rand(3, generator=generator).tolist()
    aspect = 2 ** (2 * stretch - 1)  # from half to twice as high as wide, of a picture's own shape
    rows, columns = _coordinates(grid)
    return -torch.maximum((rows - row).abs() / aspect, (columns - column).abs())


def _half_plane(grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    angle = 2 * torch.pi * torch.rand((), generator=generator)
    rows, columns = _coordinates(grid)
    return angle.cos() * columns + angle.sin() * rows


def _blobs(grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    coarse = [max(2, -(-side // PATCH) + 1) for side in grid]
    noise = torch.rand(1, 1, *coarse, generator=generator)
    return F.interpolate(noise, grid, mode="bicubic", align_corners=True)[0, 0]


def _coordinates(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of each code, [h, w], from 0 to 1."""
    rows, columns = (torch.linspace(0, 1, side) if side > 1 else torch.full((1,), 0.5) for side in grid)
    return rows[:, None].expand(grid), columns.expand(grid)
