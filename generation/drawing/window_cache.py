"""A cache whose rows stand at different places, for drawing by windows and for prompts without padding.

Shapes: R rows, T new tokens, B branches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.transformer.cache import KVCache
from generation.transformer.config import TransformerConfig

SMALLEST = 8  # places of a pass that has branches


def branches_of(size: int) -> int:
    """How many of the `size` places of a pass are branches (`generation.drawing.jacobi`)."""
    return size // 4 if size >= SMALLEST else 0


class WindowCache(KVCache):
    """A cache whose rows stand at different places: the next tokens of row r go to the slots from `starts[r]` on.

    What is there is overwritten. `store` returns keys and values of the first `reach` slots, and those behind the
    tokens are masked: if it returned them up to the foremost row, the bits of a row would depend on the others.

    With `branches`, the last tokens of a pass may be other guesses of its tokens: they have slots of their own behind
    all others, and see what those see in whose place they stand, and themselves.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden: Tensor,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        branches: int = 0,
    ) -> None:
        super().__init__(config, F.pad(hidden, (0, branches)), dtype=dtype, device=device)
        self.starts = torch.zeros(len(hidden), dtype=torch.int64, device=device)  # [R], to be set before each pass
        self.reach = self.length
        self._depths: Tensor | None = None

    def branch_at(self, depths: Tensor) -> None:
        """From the next pass on, the last B tokens are guesses of those behind `starts + depths`, [R, B]."""
        self._depths = depths

    def keep_branch(self, kept: Tensor, branch: Tensor) -> None:
        """In the rows `kept` [R], the token of number `branch` [R] takes the place of that which it is a guess of."""
        assert self._depths is not None
        rows = torch.arange(len(kept), device=kept.device)
        source = self.length - self._depths.shape[1] + branch
        place = torch.where(kept, self.starts + 1 + self._depths[rows, branch], source)
        for table in (self.keys, self.values):
            table[:, rows, :, place] = table[:, rows, :, source]

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        slots = self._slots(k.shape[2])
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        self.keys[layer][rows, :, slots] = k.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][rows, :, slots] = v.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer, :, :, : self.reach], self.values[layer, :, :, : self.reach]

    def bias(self, new: int) -> Tensor:
        slots = torch.arange(self.reach, device=self.starts.device)
        own = self._slots(new)  # [R, new]
        last = own
        if self._depths is not None:
            main = own[:, : new - self._depths.shape[1]]
            last = torch.cat([main, self.starts[:, None] + self._depths], dim=1)
        bias = self._bias[..., : self.reach].masked_fill(slots > last[:, None, :, None], -torch.inf)
        return bias.masked_fill(slots == own[:, None, :, None], 0.0)  # as in `KVCache.bias`

    def advance(self, new: int) -> None:
        """Nothing: `starts` says where the next tokens go."""

    def row(self, number: int) -> WindowCache:
        part = super().row(number)
        assert isinstance(part, WindowCache)
        part.starts = self.starts[number : number + 1]
        part._depths = None if self._depths is None else self._depths[number : number + 1]
        return part

    def _slots(self, new: int) -> Tensor:
        """[R, new]"""
        branches = 0 if self._depths is None else self._depths.shape[1]
        steps = torch.arange(self.length, device=self.starts.device)
        main = self.starts[:, None] + steps[: new - branches]
        return torch.cat([main, steps[self.length - branches :].expand(len(main), -1)], dim=1) if branches else main
