"""Wrong codes among the codes that a row is given."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from generation.rows.row import Row


def noisy_codes(codes: Tensor, other: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """`codes` with about that share of them replaced by those of `other`, which has the same shape."""
    return torch.where(torch.rand(codes.shape, generator=generator) < share, other.to(codes.dtype), codes)


def with_noise(row: Row, other: Tensor, share: float, generator: torch.Generator) -> Row:
    """A `row` that draws, with about that share of its input codes, but none of its targets, taken from `other` [h, w].

    `other` is another picture, or [MASK] everywhere. A model that cannot trust every earlier code relies more on the
    text and recovers from its own mistakes when it draws. Scheduled sampling (Bengio et al. 2015, arXiv:1506.03099) has
    the same aim; this costs only a lookup.
    """
    places = row.image_mask.roll(1).nonzero()[:, 0]  # the target of the last place is no code
    tokens = row.tokens.clone()
    tokens[places] = noisy_codes(tokens[places], other.reshape(-1)[: len(places)], share, generator)
    return replace(row, tokens=tokens)
