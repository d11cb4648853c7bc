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

PositionKind = Literal["sequence", "grid", "codes"]

COMMANDS_IN_ROW = 4  # [ROI1] [SIZE] [BOI1] [EOI1]
BEYOND = 2**30  # a level above those of all tokens


@dataclass(frozen=True)
class Row:
    """One training row, with its targets already shifted by one token.

    `tokens` [T] and `targets` [T] are int64; a target is the next token, or [PAD] where nothing is learned.
    `positions` are [T] or [T, 2], and `image_mask` [T] is true where the target is an image code. A row that describes
    has `segments` [T]: 0 for the picture and k for its k-th text. A text attends to the picture and to itself. In a row
    that is matched the picture is 1, and its texts, which do not see it, count on from there. A row with holes has
    `levels` [T], which say instead of the order who sees whom (`generation.transformer.visibility`). Without segments
    and levels, a token attends to all tokens before it. `features` [n, C] are the vectors of towers at its n [ROI1],
    for a generator that reads such vectors. A row that is matched has the `label` of what it shows.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    image_mask: Tensor
    segments: Tensor | None = None
    features: Tensor | None = None
    levels: Tensor | None = None
    label: int | None = None


@dataclass(frozen=True)
class RowBatch:
    """Rows with [PAD] at the end: `tokens`, `targets`, `image_mask`, `weights` [B, T], `positions` [B, T] or [B, T, 2].

    `weights` (float32) are 1 where the target is an image code, the text weight at text and commands, and 0 at [PAD].
    Rows that describe have `segments` [B, T] and rows with holes `levels` [B, T], see `Row`. Packed rows have
    `lengths`, see `pack`. `features` [F, C] are those of all rows, one row after another. `labels` [rows] are those of
    rows that are matched.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    image_mask: Tensor
    weights: Tensor
    segments: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    features: Tensor | None = None
    levels: Tensor | None = None
    labels: Tensor | None = None
    kind: str = ""  # of its rows, in batches to learn from

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
            None if self.features is None else self.features.to(device, non_blocking=True),
            None if self.levels is None else self.levels.to(device, non_blocking=True),
            None if self.labels is None else self.labels.to(device, non_blocking=True),
            kind=self.kind,
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
    # no token of a row sees the padding behind it
    levels = None if rows[0].levels is None else torch.full_like(tokens, BEYOND)
    for i, row in enumerate(rows):
        end = len(row.tokens)
        tokens[i, :end] = row.tokens
        targets[i, :end] = row.targets
        positions[i, :end] = row.positions
        image_mask[i, :end] = row.image_mask
        assert (row.segments is None) == (segments is None)
        if segments is not None and row.segments is not None:
            segments[i, :end] = row.segments
        assert (row.levels is None) == (levels is None)
        if levels is not None and row.levels is not None:
            levels[i, :end] = row.levels
    weights = torch.where(image_mask, 1.0, text_weight).masked_fill(targets == padding, 0.0)
    features, labels = _features(rows), _labels(rows)
    return RowBatch(
        tokens, positions, targets, image_mask, weights, segments, features=features, levels=levels, labels=labels
    )


def pack(vocab: Vocabulary, rows: Sequence[Row], text_weight: float = 1.0) -> RowBatch:
    """Put `rows` of one kind one after another, without padding: B = 1, and `RowBatch.lengths` tells them apart.

    No row attends to another. Raises `ValueError` for no row.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    assert len({(row.segments is None, row.levels is None) for row in rows}) == 1
    segments = [row.segments for row in rows if row.segments is not None]
    levels = [row.levels for row in rows if row.levels is not None]
    whole = Row(
        torch.cat([row.tokens for row in rows]),
        torch.cat([row.positions for row in rows]),
        torch.cat([row.targets for row in rows]),
        torch.cat([row.image_mask for row in rows]),
        torch.cat(segments) if segments else None,
        levels=torch.cat(levels) if levels else None,
    )
    lengths = tuple(len(row.tokens) for row in rows)
    batch = collate(vocab, [whole], text_weight)
    return replace(batch, lengths=lengths, features=_features(rows), labels=_labels(rows))


def _features(rows: Sequence[Row]) -> Tensor | None:
    found = [row.features for row in rows if row.features is not None]
    assert len(found) in (0, len(rows)), "all rows of a batch have prompt features, or none"
    return torch.cat(found) if found else None


def _labels(rows: Sequence[Row]) -> Tensor | None:
    found = [row.label for row in rows if row.label is not None]
    assert len(found) in (0, len(rows)), "all rows of a batch are matched, or none"
    return torch.tensor(found) if found else None
