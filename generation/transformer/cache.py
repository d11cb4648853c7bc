"""Keys and values of the tokens that the transformer has read already.

Shapes: B rows, H heads, T new tokens, d head width.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from generation.transformer.config import TransformerConfig
from generation.transformer.visibility import Visibility, hidden_as_bias


class KVCache:
    """Keys and values of all layers, preallocated: each [B, H, length, d], H the heads of keys.

    `hidden` [B, length] marks slots that no other token may look at (padding left of short prompts).
    `used` counts the filled slots; the model fills the next ones.
    """

    def __init__(
        self, config: TransformerConfig, hidden: Tensor, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        rows, length = hidden.shape
        shape = (config.depth, rows, config.key_heads, length, config.head_width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.used = 0
        # additive: a boolean mask would be converted anew in every layer
        self._bias = torch.zeros(rows, 1, 1, length, device=device)
        self._bias.masked_fill_(hidden.to(device)[:, None, None, :], -torch.inf)

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put `k`, `v` [B, H, T, d] after the used slots; return all keys and values up to and with them."""
        end = self.used + k.shape[2]
        assert end <= self.length, f"the cache has {self.length} slots, {end} are needed"
        self.keys[layer, :, :, self.used : end] = k
        self.values[layer, :, :, self.used : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def attend(self, layer: int, q: Tensor) -> Tensor | None:
        """Attention of `q` [B, H, T, d] to what was stored, by the cache's own kernel; None if it has none."""
        return None

    def advance(self, new: int) -> None:
        """`new` tokens have gone through all layers."""
        self.used += new

    @property
    def length(self) -> int:
        """Slots of a row."""
        return self.keys.shape[3]

    def row(self, number: int) -> KVCache:
        """The cache of one row, in the same memory, with a `used` of its own."""
        part = copy(self)
        rows = slice(number, number + 1)
        part.keys, part.values, part._bias = self.keys[:, rows], self.values[:, rows], self._bias[rows]
        return part

    def copy_row(self, source: int, to: int) -> None:
        """Give a row the keys and values of another."""
        self.keys[:, to], self.values[:, to] = self.keys[:, source], self.values[:, source]

    def take_rows(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows: the new row i is the old row `rows[i]`."""
        self.keys, self.values, self._bias = self.keys[:, rows], self.values[:, rows], self._bias[rows]

    def hide_before(self, slot: int) -> None:
        """No later token may look at the slots before `slot`."""
        self._bias[..., : max(0, slot)] = -torch.inf

    def first_bias(self, levels: Tensor) -> Tensor:
        """As `bias`, for the first tokens of all, [B, T] with `levels`: padding is hidden, and sees itself."""
        assert self.used == 0, "what is in the cache has no levels"
        length = levels.shape[1]
        padding = torch.isinf(self._bias[..., :length])
        own = torch.eye(length, dtype=torch.bool, device=levels.device)
        return hidden_as_bias((Visibility.of(levels, levels).visible().unsqueeze(1) & ~padding) | own)

    def bias(self, new: int) -> Tensor:
        """What is added to the scores of the `new` next tokens: [B, 1, new, used + new], 0 or minus infinity."""
        end = self.used + new
        bias = self._bias[..., :end]
        if new == 1:
            return bias
        slots = torch.arange(end, device=bias.device)
        queries = slots[self.used :, None]
        bias = bias.masked_fill(slots > queries, -torch.inf)
        # padding sees itself: a row of only minus infinity would become NaN and spread through V
        return bias.masked_fill(slots == queries, 0.0)
