"""Rows that are matched: a text `[ROI1] text [ENC]`, and a picture `[SIZE] [BOI1] codes [EOI1] [ENC]`.

The hidden state at [ENC] becomes a vector (`generation.transformer.match_head`): a picture and its captions have like
ones. A text begins as in a row that draws, a picture as in one that describes, and both are causal, so that [ENC] reads
what the transformer sees of them anyway; so do CoCa's texts (Yu et al. 2022, arXiv:2205.01917, section 3.2). To learn
from, a picture and its captions are one row, each a segment of its own that sees nothing but itself: they have the
vectors that they have alone. The order is the picture, then its captions. Shapes: T tokens in a row, h x w codes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data.concepts import label_of
from generation.rows.base import Chance, CodedPicture, Given, RowKind, RowRecipe
from generation.rows.describe import caption_prompt_row, caption_row_positions, disturbed
from generation.rows.draw import row_positions
from generation.rows.row import PositionKind, Row
from generation.rows.texts import CaptionMix, draw_caption
from generation.rows.vocabulary import Vocabulary


def text_to_match(vocab: Vocabulary, text_ids: Sequence[int], max_text: int, kind: PositionKind = "grid") -> Row:
    """`[ROI1] text [ENC]` of raw text pieces, cut after `max_text` of them. Raises `ValueError` for unknown pieces."""
    tokens = [vocab.command("[ROI1]"), *vocab.text(text_ids[:max_text]), vocab.command("[ENC]")]
    return _unlearned(vocab, torch.tensor(tokens), row_positions(max_text, (1, 1), max_text, kind)[: len(tokens)])


def picture_to_match(
    vocab: Vocabulary, codes: Tensor, max_text: int, kind: PositionKind = "grid", given: Tensor | None = None
) -> Row:
    """`[SIZE] [BOI1] codes [EOI1] [ENC]` of codes [h, w], without those that are false in `given`, bool [h, w].

    Raises `ValueError` for codes of another shape or a grid without a size command.
    """
    if codes.ndim != 2:
        raise ValueError(f"codes must be [h, w], not {list(codes.shape)}")
    tokens = torch.tensor([*caption_prompt_row(vocab, codes)[:-1], vocab.command("[ENC]")])
    positions = caption_row_positions(0, (codes.shape[0], codes.shape[1]), max_text, kind)[: len(tokens)]
    kept = torch.ones_like(tokens, dtype=torch.bool)
    if given is not None:
        kept[2:-2] = given.reshape(-1)  # [SIZE] and [BOI1] come before the codes, [EOI1] and [ENC] after them
    return _unlearned(vocab, tokens[kept], positions[kept])


def matched_row(parts: Sequence[Row], label: int | None = None) -> Row:
    """Rows behind one another as segments of one, none of which sees another."""
    segments = [torch.full_like(part.tokens, number) for number, part in enumerate(parts, start=1)]
    return Row(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.positions for part in parts]),
        torch.cat([part.targets for part in parts]),
        torch.cat([part.image_mask for part in parts]),
        torch.cat(segments),
        label=label,
    )


def _unlearned(vocab: Vocabulary, tokens: Tensor, positions: Tensor) -> Row:
    nothing = torch.full_like(tokens, vocab.command("[PAD]"))
    return Row(tokens, positions, nothing, torch.zeros_like(tokens, dtype=torch.bool))


class MatchRows(RowKind):
    """Match: a picture and captions of it, of which a contrastive objective compares the vectors.

    No token is learned, and no vector of towers is read: that of the picture would tell a caption what to match.
    """

    name = "match"
    needs_caption = True

    def training_row(self, picture: CodedPicture, recipe: RowRecipe, chance: Chance) -> Row:
        codes, given = disturbed(picture.codes, recipe, chance)
        always = replace(recipe.captions, dropout=0.0)
        texts = [draw_caption(picture.sample, always, chance.rng).text for _ in range(recipe.match_texts)]
        return self._row(picture, texts, recipe, codes, given)

    def held_out_row(self, picture: CodedPicture, recipe: RowRecipe, named_style: bool) -> Row:
        names = CaptionMix(name=1.0, keywords=0.0, style=float(named_style), dropout=0.0)
        text = draw_caption(picture.sample, names, random.Random(picture.sample.id)).text
        return self._row(picture, [text], recipe, picture.codes)

    def text_row(self, pieces: Sequence[int]) -> Row:
        """The row of a text alone."""
        return text_to_match(self.format.vocabulary, pieces, self.format.max_text, self.format.position_kind)

    def picture_row(self, codes: Tensor, given: Tensor | None = None) -> Row:
        """The row of a picture alone, codes [h, w], without those that are false in `given`, bool [h, w]."""
        format = self.format
        return picture_to_match(format.vocabulary, codes, format.max_text, format.position_kind, given)

    def prompt(self, given: Given) -> list[int]:
        """The row of the picture, or of the text where no codes are given: there is nothing to go on with."""
        row = self.text_row(given.text) if given.codes is None else self.picture_row(given.codes)
        tokens: list[int] = row.tokens.tolist()
        return tokens

    def positions(self, num_text: int, grid: tuple[int, int]) -> Tensor:
        """Positions of a picture and of one text behind it, with `num_text` pieces."""
        codes = torch.zeros(grid, dtype=torch.int64)
        return torch.cat([self.picture_row(codes).positions, self.text_row([0] * num_text).positions])

    def _row(
        self, picture: CodedPicture, texts: Sequence[str], recipe: RowRecipe, codes: Tensor, given: Tensor | None = None
    ) -> Row:
        parts = [self.picture_row(codes, given), *(self.text_row(recipe.text.encode(text)) for text in texts)]
        return matched_row(parts, label_of(picture.sample))
