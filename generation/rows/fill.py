"""Rows with holes: `[ROI1] text [SIZE] [BOI1] codes [EOI1]`, as rows that draw, but some of the codes are known.

Every code stays in its place and predicts the next one, as in CogLM (Ding et al. 2022, arXiv:2204.14217, section 3).
Only who sees whom differs: kept codes have the level of [BOI1], so that all codes see all of them; holes count up from
there in raster order, so that a hole sees the holes before it too. A kept code sees no hole: a hole right after it is
predicted from the kept codes alone, which are all known before the first hole is drawn. With nothing kept, the row
is one that draws.

Shapes: T tokens in a row, h x w codes in a picture.
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from generation.rows.base import Chance, CodedPicture, RowRecipe
from generation.rows.draw import DrawRows
from generation.rows.holes import draw_holes
from generation.rows.noise import noisy_codes
from generation.rows.row import Row
from generation.rows.vocabulary import Vocabulary


def kept_levels(before: int, hidden: Tensor) -> Tensor:
    """The levels [before + S] of `before` tokens up to and with [BOI1], and of codes, `hidden` [S] (bool) or kept."""
    text = torch.arange(before, device=hidden.device)
    codes = torch.where(hidden, before - 1 + hidden.cumsum(0), before - 1)
    return torch.cat([text, codes])


def with_holes(vocab: Vocabulary, row: Row, hidden: Tensor) -> Row:
    """A `row` that draws, as one in which only the `hidden` codes (bool [h, w]) are to be drawn, and learned."""
    flat = hidden.flatten()
    before = len(row.tokens) - len(flat)
    # the token before a code has it for a target; the last code has [EOI1], and the texts have texts
    kept = torch.zeros_like(row.image_mask)
    kept[before - 1 : -1] = ~flat
    targets = row.targets.masked_fill(kept, vocab.command("[PAD]"))
    return replace(row, targets=targets, image_mask=row.image_mask & ~kept, levels=kept_levels(before, flat))


class FillRows(DrawRows):
    """Fill: the hidden codes of a picture after its caption, in sight of all others."""

    name = "fill"

    def training_row(self, picture: CodedPicture, recipe: RowRecipe, chance: Chance) -> Row:
        rng = chance.rng
        row = self._captioned(picture, recipe, rng)
        hidden = draw_holes((picture.codes.shape[0], picture.codes.shape[1]), rng)
        if recipe.code_noise:
            # of the holes alone: what is kept is the user's, and is right
            generator = torch.Generator().manual_seed(rng.getrandbits(63))
            noisy = noisy_codes(picture.codes, chance.other_codes(rng), rng.uniform(0, recipe.code_noise), generator)
            codes = torch.where(hidden, noisy, picture.codes).flatten().to(row.tokens.dtype)
            row = replace(row, tokens=torch.cat([row.tokens[: -len(codes)], codes]))
        return with_holes(self.format.vocabulary, row, hidden)

    def held_out_row(self, picture: CodedPicture, recipe: RowRecipe, named_style: bool) -> Row:
        row = super().held_out_row(picture, recipe, named_style)
        grid = (picture.codes.shape[0], picture.codes.shape[1])
        return with_holes(self.format.vocabulary, row, draw_holes(grid, random.Random(picture.sample.id)))
