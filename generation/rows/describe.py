"""Rows that describe: `[SIZE] [BOI1] codes [EOI1] [ROI1] text [SEP]`.

One model can learn to draw and to describe, each from its own rows, as ERNIE-ViLG does (Zhang et al. 2021,
arXiv:2112.15283, section 3.1). Shapes: T tokens in a row, h x w codes in a picture.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from generation.rows.base import Chance, CodedPicture, Given, RowKind, RowRecipe
from generation.rows.draw import row_positions
from generation.rows.noise import noisy_codes
from generation.rows.row import COMMANDS_IN_ROW, PositionKind, Row
from generation.rows.texts import descriptions
from generation.rows.vocabulary import Vocabulary

BLIND = 0.25  # of the rows to learn from have no vector: it tells almost all of a picture that the towers learned


def caption_prompt_row(vocab: Vocabulary, codes: Tensor, text_ids: Sequence[int] = ()) -> list[int]:
    """`[SIZE] [BOI1] codes [EOI1] [ROI1] text`: codes [h, w] and the raw text pieces that the caption begins with."""
    grid = (codes.shape[0], codes.shape[1])
    start = [vocab.size_command(grid), vocab.command("[BOI1]"), *codes.reshape(-1).tolist()]
    return [*start, vocab.command("[EOI1]"), vocab.command("[ROI1]"), *vocab.text(text_ids)]


def caption_row_positions(num_text: int, grid: tuple[int, int], max_text: int, kind: PositionKind) -> Tensor:
    """Positions of `[SIZE] [BOI1] codes [EOI1] [ROI1] text [SEP]`: [T] ("sequence") or [T, 2] ("grid").

    In a "grid", text and codes have the positions that they have in a row that draws; only their order differs. [SIZE]
    and [BOI1] come right before the origin of the codes: a position that depends on the text would reveal its length.
    """
    height, width = grid
    if kind == "sequence":
        return torch.arange(num_text + height * width + COMMANDS_IN_ROW + 1)
    image = row_positions(max_text, grid, max_text, kind)[max_text + 1 :]  # [SIZE] [BOI1] codes [EOI1]
    text = torch.arange(num_text + 2).unsqueeze(1).expand(-1, 2)  # [ROI1] text [SEP]
    return torch.cat([image, text])


def caption_row(
    vocab: Vocabulary,
    texts: Sequence[Sequence[int]],
    codes: Tensor,
    max_text: int,
    kind: PositionKind = "grid",
    given: Tensor | None = None,
) -> Row:
    """The training row in which each of `texts` (raw pieces, cut after `max_text` of them) describes `codes` [h, w].

    No text attends to another (`Row.segments`), so the row replaces one row for each text and holds the picture once.
    Only text is learned. `given`, bool [h, w], is false at codes to leave out: that is cheaper and hardly worse than
    the whole picture, as in FLIP (Li et al. 2022, arXiv:2212.00794). Raises `ValueError` for codes of another shape,
    pieces outside the vocabulary or a grid without a size command.
    """
    texts = [vocab.text(text[:max_text]) for text in texts]
    return segmented_row(vocab, [(text, 0) for text in texts], codes, max_text, kind, given)


def segmented_row(
    vocab: Vocabulary,
    texts: Sequence[tuple[Sequence[int], int]],
    codes: Tensor,
    max_text: int,
    kind: PositionKind = "grid",
    given: Tensor | None = None,
) -> Row:
    """`caption_row` of texts as ids of the vocabulary, each with how many of its first ids are not learned."""
    if codes.ndim != 2:
        raise ValueError(f"codes must be [h, w], not {list(codes.shape)}")
    grid = (codes.shape[0], codes.shape[1])
    picture = torch.tensor(caption_prompt_row(vocab, codes)[:-1])
    kept = torch.ones_like(picture, dtype=torch.bool)
    if given is not None:
        kept[2:-1] = given.reshape(-1)  # [SIZE] and [BOI1] come before the codes, [EOI1] after them
    tokens, positions = [picture[kept]], [caption_row_positions(0, grid, max_text, kind)[: len(picture)][kept]]
    targets, segments = [torch.full_like(tokens[0], vocab.command("[PAD]"))], [torch.zeros_like(tokens[0])]
    for number, (text, told) in enumerate(texts, start=1):
        whole = torch.tensor([vocab.command("[ROI1]"), *text, vocab.command("[SEP]")])
        tokens.append(whole[:-1])
        targets.append(whole[1:].clone())
        targets[-1][:told] = vocab.command("[PAD]")
        positions.append(caption_row_positions(len(whole) - 2, grid, max_text, kind)[len(picture) : -1])
        segments.append(torch.full_like(tokens[-1], number))
    row = torch.cat(tokens)
    no_codes = torch.zeros_like(row, dtype=torch.bool)
    return Row(row, torch.cat(positions), torch.cat(targets), no_codes, torch.cat(segments))


def disturbed(codes: Tensor, recipe: RowRecipe, chance: Chance) -> tuple[Tensor, Tensor]:
    """`codes` [h, w] with the noise of `recipe`, and which of them the row is given, bool [h, w]."""
    generator = torch.Generator().manual_seed(chance.rng.getrandbits(63))
    share = chance.rng.uniform(0, recipe.code_noise)
    noisy = noisy_codes(codes, chance.other_codes(chance.rng), share, generator)
    given = torch.zeros(codes.numel(), dtype=torch.bool)
    given[torch.randperm(len(given), generator=generator)[: max(1, round(chance.given * len(given)))]] = True
    return noisy, given.view(codes.shape)


class DescribeRows(RowKind):
    """Describe: the names of a picture after its codes, all in one row, where no name attends to another.

    A generator that draws from pictures' vectors too reads the picture's own at each [ROI1].
    """

    name = "describe"
    needs_caption = True

    def training_row(self, picture: CodedPicture, recipe: RowRecipe, chance: Chance) -> Row:
        noisy, given = disturbed(picture.codes, recipe, chance)
        texts = [recipe.text.encode(description) for description in descriptions(picture.sample)]
        row = self._row(texts, noisy, given)
        return with_picture_vector(row, picture, recipe, is_blind(recipe, chance))

    def held_out_row(self, picture: CodedPicture, recipe: RowRecipe, named_style: bool) -> Row:
        description = random.Random(picture.sample.id).choice(descriptions(picture.sample))
        row = self._row([recipe.text.encode(description)], picture.codes)
        return with_picture_vector(row, picture, recipe, False)

    def prompt(self, given: Given) -> list[int]:
        assert given.codes is not None, "a picture to describe is given by its codes"
        return caption_prompt_row(self.format.vocabulary, given.codes, given.text)

    def positions(self, num_text: int, grid: tuple[int, int]) -> Tensor:
        return caption_row_positions(num_text, grid, self.format.max_text, self.format.position_kind)

    def _row(self, texts: Sequence[Sequence[int]], codes: Tensor, given: Tensor | None = None) -> Row:
        format = self.format
        return caption_row(format.vocabulary, texts, codes, format.max_text, format.position_kind, given)


def is_blind(recipe: RowRecipe, chance: Chance) -> bool:
    """Whether a row to learn from goes without the picture's vector."""
    return bool(recipe.from_picture) and chance.rng.random() < BLIND


def with_picture_vector(row: Row, picture: CodedPicture, recipe: RowRecipe, blind: bool) -> Row:
    """The row with the picture's vector [1, C] at each of its texts; zeros where it is `blind`."""
    if recipe.features is None or not recipe.from_picture:
        return row
    assert row.segments is not None
    vector = torch.zeros(1, recipe.features.width) if blind else recipe.features.of_sample(picture.sample.id)
    return replace(row, features=vector.expand(int(row.segments.max()), -1))
