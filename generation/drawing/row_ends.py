"""Pictures whose rows of codes are told apart in the row of tokens: a piece stands behind each, which nobody samples.

So Emu3 draws (Wang et al. 2024, arXiv:2409.18869, section 2.3). Drawing counts places: codes and the ends between them.
An end is a code that is given: it is read like one, and nothing is drawn there.

Shapes: n pictures of h x w codes, S codes of a picture, P places of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from generation.transformer.config import TransformerConfig


@dataclass(frozen=True)
class PictureRows:
    """How the codes of a picture of `grid` lie among its places; `end` is the token between rows, -1: there is none."""

    grid: tuple[int, int]
    end: int = -1

    @classmethod
    def of(cls, config: TransformerConfig, grid: tuple[int, int]) -> PictureRows:
        """Those of a model."""
        return cls(grid, config.vocabulary.text([config.row_end])[0] if config.row_end >= 0 else -1)

    @property
    def stride(self) -> int:
        """Places from a code to the one below it."""
        return self.grid[1] + int(self.end >= 0)

    def spread(self, codes: Tensor) -> Tensor:
        """Codes [n, S] as places [n, P], with the ends in them."""
        if self.end < 0:
            return codes
        rows = codes.view(-1, *self.grid)
        ends = torch.full_like(rows[:, :, :1], self.end)
        return torch.cat([rows, ends], dim=2).flatten(1)[:, :-1].contiguous()

    def pictures(self, places: Tensor) -> Tensor:
        """The codes [n, h, w] of places [n, P]; the same memory where there are no ends."""
        if self.end < 0:
            return places.view(-1, *self.grid)
        height, width = self.grid
        rows = torch.cat([places, places[:, :1]], dim=1).view(-1, height, width + 1)
        return rows[:, :, :width].contiguous()

    def is_end(self, place: int) -> bool:
        """Whether the end of a row stands at a place."""
        return self.end >= 0 and place % self.stride == self.grid[1]

    def codes_before(self, place: int) -> int:
        """Codes among the places before `place`."""
        return place if self.end < 0 else place - place // self.stride

    def code_numbers(self, places: Tensor) -> Tensor:
        """The number of the code at each of `places`, and at an end that of the code before it."""
        if self.end < 0:
            return places
        row, column = places // self.stride, places % self.stride
        return row * self.grid[1] + column.clamp_max(self.grid[1] - 1)
