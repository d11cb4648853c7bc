"""A training row, and batches of rows, which are padded or packed.

Shapes: B rows in a batch, T tokens in a row.
"""

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
    """One training row, with its targets already shifted by one token.

    `tokens` [T] and `targets` [T] are int64; a target is the next token, or [PAD] where nothing is learned.
    `positions` are [T] or [T, 2], and `image_mask` [T] is true where the target is an image code. A row that describes
    has `segments` [T]: 0 for the picture and k for its k-th text. A text attends to the picture and to itself. Without
    segments, a token attends to all tokens before it.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    image_mask: Tensor
    segments: Tensor | None = None


@dataclass(frozen=True)
class RowBatch:
    """Rows with [PAD] at the end: `tokens`, `targets`, `image_mask`, `weights` [B, T], `positions` [B, T] or [B, T, 2].

    `weights` (float32) are 1 where the target is an image code, the text weight at text and commands, and 0 at [PAD].
    Rows that describe have `segments` [B, T], see `Row`. Packed rows have `lengths`, see `pack`.
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
    """Stack `rows` of one kind, each padded with [PAD] to the longest of them. Raises `ValueError` for no row."""
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
    """Put `rows` of one kind one after another, without padding: B = 1, and `RowBatch.lengths` tells them apart.

    No row attends to another. Raises `ValueError` for no row.
    """
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
