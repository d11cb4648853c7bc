"""Who sees whom in a row: one rule, as a bias for PyTorch's attention and as a block mask for FlexAttention.

Every token has a level. Token i sees token j if `level[j] <= level[i]`, and the segment of j is 0 or that of i, and
both are of one packed row. What a row is for decides its levels and segments:

* a causal row: levels count up;
* a row that describes (`generation.rows.describe`): levels count up, and each text is a segment of its own;
* a row that is matched (`generation.rows.match`): levels count up, and the picture is such a segment, too;
* a row with holes (`generation.rows.fill`): kept codes share a level, holes count up. So are the image of CogLM (Ding
  et al. 2022, arXiv:2204.14217, section 3) and its text, and Parts A and B of GLM (Du et al. 2022, arXiv:2103.10360,
  section 2.1).

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Place = tuple[Tensor, Tensor, Tensor]  # levels, segments and packed rows of some tokens
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of a row, a head, a query and a key


def sees(query: Place, key: Place) -> Tensor:
    """Whether the tokens `query` see the tokens `key`: bool, of the shape that the two broadcast to."""
    (level, segment, row), (other_level, other_segment, other_row) = query, key
    return (other_level <= level) & ((other_segment == 0) | (other_segment == segment)) & (other_row == row)


def hidden_as_bias(visible: Tensor) -> Tensor:
    """Float32, 0 where `visible` (bool) and minus infinity elsewhere: what is added to scores."""
    return torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, -torch.inf)


@dataclass(frozen=True)
class Visibility:
    """Who sees whom among tokens with `levels`, `segments` and packed `rows`, each int64 [B, T]."""

    levels: Tensor
    segments: Tensor
    rows: Tensor

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        levels: Tensor | None = None,
        segments: Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> Visibility:
        """That of `tokens` [B, T]. Without levels they count up; without segments all are 0.

        With `lengths`, B is 1, and the row holds rows of those lengths behind one another.
        """
        rows = torch.zeros_like(tokens)
        if lengths is not None:
            numbers = torch.arange(len(lengths), device=tokens.device)
            rows = numbers.repeat_interleave(torch.tensor(lengths, device=tokens.device)).unsqueeze(0)
        if levels is None:
            levels = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return cls(levels, torch.zeros_like(tokens) if segments is None else segments, rows)

    def visible(self) -> Tensor:
        """Bool [B, T, T], queries first."""
        queries, keys = (tuple(x.unsqueeze(axis) for x in self._fields) for axis in (2, 1))
        return sees(queries, keys)  # type: ignore[arg-type]

    def bias(self) -> Tensor:
        """What is added to the scores: [B, 1, T, T], 0 or minus infinity."""
        return hidden_as_bias(self.visible()).unsqueeze(1)

    def split(self, lengths: tuple[int, ...]) -> list[Visibility]:
        """That of each packed row."""
        parts = (x.split(lengths, dim=1) for x in self._fields)
        return [Visibility(*one) for one in zip(*parts, strict=True)]

    def block_mask(self) -> Any:
        """A `BlockMask` of FlexAttention, which skips blocks of 128 x 128 tokens that see nothing of each other."""
        # imports PyTorch's compiler (seconds), which drawing does not need
        from torch.nn.attention.flex_attention import create_block_mask

        count, length = self.levels.shape
        return create_block_mask(self.mask_mod(), count, None, length, length, device=str(self.levels.device))

    def mask_mod(self) -> MaskMod:
        """The rule as FlexAttention asks for it: does the token `query` of row `batch` see the token `key`?"""
        levels, segments, rows = self._fields

        # a function: FlexAttention counts the arguments of a method wrongly
        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seeing = levels[batch, query], segments[batch, query], rows[batch, query]
            return sees(seeing, (levels[batch, key], segments[batch, key], rows[batch, key]))

        return visible

    @property
    def _fields(self) -> Place:
        return self.levels, self.segments, self.rows
