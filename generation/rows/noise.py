"""Wrong codes among those that a row is given."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from generation.rows.row import Row


def noisy_codes(codes: Tensor, other: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """`codes` with that share of them taken from the same places of `other`: both of any, the same, shape."""
    return torch.where(torch.rand(codes.shape, generator=generator) < share, other.to(codes.dtype), codes)


def with_noise(row: Row, other: Tensor, share: float, generator: torch.Generator) -> Row:
    """A `row` that draws, with that share of the codes it is given, not of its targets, taken from `other` [h, w].

    `other` is another picture, or [MASK] all over.
    A model that cannot trust every code before looks more at the text and survives its own slips when it draws: the
    aim of scheduled sampling (Bengio et al. 2015, arXiv:1506.03099), for the price of a lookup.
    """
    places = row.image_mask.roll(1).nonzero()[:, 0]  # the target of the last place is no code
    tokens = row.tokens.clone()
    tokens[places] = noisy_codes(tokens[places], other.reshape(-1)[: len(places)], share, generator)
    return replace(row, tokens=tokens)
