"""A cache whose rows stand at different places, for drawing by windows and for prompts without padding.

Shapes: R rows, T new tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from generation.transformer.cache import KVCache
from generation.transformer.config import TransformerConfig


class WindowCache(KVCache):
    """A cache whose rows stand at different places: the next tokens of row r go to the slots from `starts[r]` on.

    What is there is overwritten. `store` returns keys and values of the first `reach` slots, and those behind the
    tokens are masked: if it returned them up to the foremost row, the bits of a row would depend on the others.
    """

    def __init__(self, config: TransformerConfig, hidden: Tensor, *, dtype: torch.dtype, device: torch.device | str):
        super().__init__(config, hidden, dtype=dtype, device=device)
        self.starts = torch.zeros(len(hidden), dtype=torch.int64, device=device)  # [R], to be set before each pass
        self.reach = self.length

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        slots = self._slots(k.shape[2])
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        self.keys[layer][rows, :, slots] = k.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][rows, :, slots] = v.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer, :, :, : self.reach], self.values[layer, :, :, : self.reach]

    def bias(self, new: int) -> Tensor:
        slots = torch.arange(self.reach, device=self.starts.device)
        queries = self._slots(new)[:, None, :, None]  # [R, 1, new, 1]
        bias = self._bias[..., : self.reach].masked_fill(slots > queries, -torch.inf)
        return bias.masked_fill(slots == queries, 0.0)  # as in `KVCache.bias`

    def advance(self, new: int) -> None:
        """Nothing: `starts` says where the next tokens go."""

    def row(self, number: int) -> WindowCache:
        part = super().row(number)
        assert isinstance(part, WindowCache)
        part.starts = self.starts[number : number + 1]
        return part

    def _slots(self, new: int) -> Tensor:
        """[R, new]"""
        return self.starts[:, None] + torch.arange(new, device=self.starts.device)
