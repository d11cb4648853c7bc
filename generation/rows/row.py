"""A training row, and batches of rows: padded or packed. Shapes: B rows in a batch, T tokens in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from generation.rows.vocabulary import Vocabulary

PositionKind = Literal["sequence", "grid"]

COMMANDS_IN_ROW = 4  # [ROI1] [SIZE] [BOI1] [EOI1]


@dataclass(frozen=True)
class Row:
    """One training row, inputs and targets already shifted against each other.

    `tokens` [T], `targets` [T] (the token after each, [PAD] where nothing is to be learned), `positions` [T] or
    [T, 2], `image_mask` [T] (the target is an image code). A row that describes has `segments` [T]: 0 at the picture,
    k at its k-th text. A text sees the picture and itself; without segments, a token sees all before it.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    image_mask: Tensor
    segments: Tensor | None = None


@dataclass(frozen=True)
class RowBatch:
    """Rows with [PAD] at the end: `tokens`, `targets`, `image_mask`, `weights` [B, T], `positions` [B, T] or [B, T, 2].

    `weights` (float32) is 1 where the target is an image code, the text weight at text and commands, 0 at [PAD].
    `segments` [B, T] is there if the rows describe, see `Row`. `lengths` is there if the rows are packed (`pack`).
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    image_mask: Tensor
    weights: Tensor
    segments: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def to(self, device: torch.device | str) -> RowBatch:
        """The same batch on another device."""
        return RowBatch(
            self.tokens.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.image_mask.to(device, non_blocking=True),
            self.weights.to(device, non_blocking=True),
            None if self.segments is None else self.segments.to(device, non_blocking=True),
            self.lengths,
        )


def collate(vocab: Vocabulary, rows: Sequence[Row], text_weight: float = 1.0) -> RowBatch:
    """Stack `rows`, padded at the end with [PAD] to the longest of them. All of them draw, or all describe."""
    if not rows:
        raise ValueError("a batch needs at least one row")
    size, length, padding = len(rows), max(len(row.tokens) for row in rows), vocab.command("[PAD]")
    tokens = torch.full((size, length), padding)
    targets = tokens.clone()
    positions = torch.zeros(size, length, *rows[0].positions.shape[1:], dtype=torch.int64)
    image_mask = torch.zeros(size, length, dtype=torch.bool)
    segments = None if rows[0].segments is None else torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        end = len(row.tokens)
        tokens[i, :end] = row.tokens
        targets[i, :end] = row.targets
        positions[i, :end] = row.positions
        image_mask[i, :end] = row.image_mask
        assert (row.segments is None) == (segments is None)
        if segments is not None and row.segments is not None:
            segments[i, :end] = row.segments
    weights = torch.where(image_mask, 1.0, text_weight).masked_fill(targets == padding, 0.0)
    return RowBatch(tokens, positions, targets, image_mask, weights, segments)


def pack(vocab: Vocabulary, rows: Sequence[Row], text_weight: float = 1.0) -> RowBatch:
    """`rows` behind one another in one row without padding, B = 1; `RowBatch.lengths` are theirs. None sees another."""
    if not rows:
        raise ValueError("a batch needs at least one row")
    assert len({row.segments is None for row in rows}) == 1
    segments = [row.segments for row in rows if row.segments is not None]
    whole = Row(
        torch.cat([row.tokens for row in rows]),
        torch.cat([row.positions for row in rows]),
        torch.cat([row.targets for row in rows]),
        torch.cat([row.image_mask for row in rows]),
        torch.cat(segments) if segments else None,
    )
    return replace(collate(vocab, [whole], text_weight), lengths=tuple(len(row.tokens) for row in rows))
