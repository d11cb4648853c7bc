"""Rows that draw: `[ROI1] text [SIZE] [BOI1] codes [EOI1]`.

The order is CogView's (Ding et al. 2021, arXiv:2105.13290, section 2.1).
Shapes: T tokens in a row, h x w codes in a picture.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from generation.rows.base import Chance, CodedPicture, Given, RowKind, RowRecipe
from generation.rows.noise import with_noise
from generation.rows.row import COMMANDS_IN_ROW, PositionKind, Row
from generation.rows.texts import CaptionMix, DrawnCaption, draw_caption
from generation.rows.vocabulary import Vocabulary


def row_positions(num_text: int, grid: tuple[int, int], max_text: int, kind: PositionKind) -> Tensor:
    """Positions of a whole row with `num_text` text pieces: [T] ("sequence") or [T, 2] (else), T = num_text+h*w+4.

    "sequence" counts 0, 1, 2, ... as CogView does. "grid" puts text and commands on the diagonal, (t, t), and code
    (r, c) at (M + r, M + c) with M = max_text + 4, beyond any text. The positions of a picture then do not depend on
    the length of its caption, so they can be learned. [EOI1] is at (M + h, M + w). "codes" gives text and commands no
    position, (0, 0), and code (r, c) the one (1 + r, 1 + c), as LlamaGen does.
    """
    height, width = grid
    before = num_text + COMMANDS_IN_ROW - 1  # everything up to [BOI1], inclusive
    if kind == "sequence":
        return torch.arange(before + height * width + 1)
    origin = 1 if kind == "codes" else max_text + COMMANDS_IN_ROW
    diagonal = torch.arange(before).unsqueeze(1).expand(before, 2)
    if kind == "codes":
        diagonal = torch.zeros_like(diagonal)
    cells = origin + torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2)
    end = torch.tensor([[origin + height, origin + width]])
    return torch.cat([diagonal, cells, end])


def prompt_row(vocab: Vocabulary, text_ids: Sequence[int], grid: tuple[int, int], max_text: int) -> list[int]:
    """`[ROI1] text [SIZE] [BOI1]`, the tokens before the codes.

    `text_ids` are raw text pieces, cut after `max_text` of them; without any, this is the unconditional prompt of
    classifier-free guidance. Raises `ValueError` for pieces outside the vocabulary or a grid without a size command.
    """
    start = [vocab.command("[ROI1]"), *vocab.text(text_ids[:max_text])]
    return [*start, vocab.size_command(grid), vocab.command("[BOI1]")]


def training_row(
    vocab: Vocabulary, text_ids: Sequence[int], codes: Tensor, max_text: int, kind: PositionKind = "grid"
) -> Row:
    """The row of raw text pieces, cut after `max_text` of them, and `codes` [h, w] in raster order.

    Raises `ValueError` for codes of another shape, and as `prompt_row` does.
    """
    if codes.ndim != 2:
        raise ValueError(f"codes must be [h, w], not {list(codes.shape)}")
    grid = (codes.shape[0], codes.shape[1])
    prompt = prompt_row(vocab, text_ids, grid, max_text)
    codes = codes.reshape(-1).to(torch.int64)
    row = torch.cat([torch.tensor(prompt), codes, torch.tensor([vocab.command("[EOI1]")])])
    positions = row_positions(len(prompt) + 1 - COMMANDS_IN_ROW, grid, max_text, kind)
    targets = row[1:]
    return Row(row[:-1], positions[:-1], targets, targets < vocab.num_image_codes)


class DrawRows(RowKind):
    """Draw: the codes of a picture after its caption."""

    name = "draw"
    needs_caption = False

    def training_row(self, picture: CodedPicture, recipe: RowRecipe, chance: Chance) -> Row:
        rng = chance.rng
        row = self._captioned(picture, recipe, rng)
        if not (recipe.code_noise or recipe.code_mask):
            return row
        if rng.random() < recipe.code_mask:
            # codes that cannot be continued must be predicted from the text
            other = torch.full(picture.codes.shape, self.format.vocabulary.command("[MASK]"))
            share = rng.uniform(0.5, 1)
        else:
            other, share = chance.other_codes(rng), rng.uniform(0, recipe.code_noise)
        return with_noise(row, other, share, torch.Generator().manual_seed(rng.getrandbits(63)))

    def held_out_row(self, picture: CodedPicture, recipe: RowRecipe, named_style: bool) -> Row:
        names = CaptionMix(name=1.0, keywords=0.0, style=float(named_style), dropout=0.0)
        return self._row(picture, draw_caption(picture.sample, names, random.Random(picture.sample.id)), recipe)

    def prompt(self, given: Given) -> list[int]:
        return prompt_row(self.format.vocabulary, given.text, given.grid, self.format.max_text)

    def positions(self, num_text: int, grid: tuple[int, int]) -> Tensor:
        return row_positions(num_text, grid, self.format.max_text, self.format.position_kind)

    def _captioned(self, picture: CodedPicture, recipe: RowRecipe, rng: random.Random) -> Row:
        """A row with a caption drawn by chance, and all codes as they are."""
        row = self._row(picture, draw_caption(picture.sample, recipe.captions, rng), recipe)
        if recipe.from_picture and row.features is not None and row.features.any():
            row = self._from_picture(row, picture, recipe, rng)
        return row

    def _from_picture(self, row: Row, picture: CodedPicture, recipe: RowRecipe, rng: random.Random) -> Row:
        """In the share `from_picture` of the rows the vector is the picture's own, and half of these have no text."""
        if rng.random() >= recipe.from_picture:
            return row
        assert recipe.features is not None
        if rng.random() < 0.5:
            row = self._row(picture, DrawnCaption(), recipe)
        return replace(row, features=recipe.features.of_sample(picture.sample.id))

    def _row(self, picture: CodedPicture, caption: DrawnCaption, recipe: RowRecipe) -> Row:
        ids, format, source = recipe.text.encode(caption.text) if caption.text else [], self.format, recipe.features
        row = training_row(format.vocabulary, ids, picture.codes, format.max_text, format.position_kind)
        if source is None:
            return row
        # of the name, not of the whole caption: names can be known before training, and a style is no content
        features = source.of_text(caption.name) if caption.text else torch.zeros(1, source.width)
        return replace(row, features=features)
