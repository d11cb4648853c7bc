"""Rows that answer questions about a picture: `[SIZE] [BOI1] codes [EOI1]`, then `[ROI1] question [SEP] answer [SEP]`.

Every question of a picture is a segment of one row, as every text is of a row that describes: no question sees another,
and the picture is there once. The answers alone are learned. Shapes: T tokens in a row, h x w codes in a picture.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from data.sample import Question, Sample
from data.styles import tagged
from generation.rows.base import Chance, CodedPicture, Given, RowFormat, RowKind, RowRecipe
from generation.rows.describe import (
    caption_prompt_row,
    caption_row_positions,
    disturbed,
    is_blind,
    segmented_row,
    with_picture_vector,
)
from generation.rows.row import Row

MOST_QUESTIONS = 16  # of a picture in one row to learn from: a longer row takes memory by the square

LEAST_TEXT = 3  # pieces: of a question, [SEP], of an answer

AskedPieces = tuple[Sequence[int], Sequence[int]]  # a question and its answer, as raw text pieces


class AnswerRows(RowKind):
    """Answer: the questions of a picture and their answers after its codes, each seeing the picture and itself."""

    name = "answer"
    needs_caption = False
    lacking = "question"

    def __init__(self, format: RowFormat) -> None:
        """Raises `ValueError` for a model that reads no question and answer in one row."""
        if format.max_text < LEAST_TEXT:
            raise ValueError(f"questions need model.max_text of {LEAST_TEXT} or more, not {format.max_text}")
        super().__init__(format)

    def suits(self, sample: Sample) -> bool:
        return bool(sample.questions)

    def training_row(self, picture: CodedPicture, recipe: RowRecipe, chance: Chance) -> Row:
        codes, given = disturbed(picture.codes, recipe, chance)
        asked = picture.sample.questions
        if len(asked) > MOST_QUESTIONS:
            asked = tuple(chance.rng.sample(asked, MOST_QUESTIONS))
        row = self.row([_pieces(one, recipe) for one in asked], codes, given)
        return with_picture_vector(row, picture, recipe, is_blind(recipe, chance))

    def held_out_row(self, picture: CodedPicture, recipe: RowRecipe, named_style: bool) -> Row:
        row = self.row([_pieces(one, recipe) for one in picture.sample.questions], picture.codes)
        return with_picture_vector(row, picture, recipe, False)

    def row(self, asked: Sequence[AskedPieces], codes: Tensor, given: Tensor | None = None) -> Row:
        """The row of questions about `codes` [h, w], of which those in `given`, bool [h, w], are there (default: all).

        Raises `ValueError` as `caption_row` does.
        """
        format, vocab, texts = self.format, self.format.vocabulary, []
        for question, answer in asked:
            said = vocab.text(answer[: format.max_text - 1])
            start = [*self._question(question, len(said)), vocab.command("[SEP]")]
            texts.append(([*start, *said], len(start)))
        return segmented_row(vocab, texts, codes, format.max_text, format.position_kind, given)

    def prompt(self, given: Given) -> list[int]:
        """`[SIZE] [BOI1] codes [EOI1] [ROI1] question [SEP]`, with `room` for an answer."""
        assert given.codes is not None, "a picture to be asked about is given by its codes"
        vocab = self.format.vocabulary
        return [*caption_prompt_row(vocab, given.codes), *self._question(given.text, 1), vocab.command("[SEP]")]

    def room(self, question: Sequence[int]) -> int:
        """How many pieces an answer to `question` may have: at least one, for which a question is cut."""
        return max(1, self.format.max_text - 1 - len(question))

    def positions(self, num_text: int, grid: tuple[int, int]) -> Tensor:
        """See `RowKind.positions`; `num_text` counts the pieces of question and answer, not the [SEP] between them."""
        return caption_row_positions(num_text + 1, grid, self.format.max_text, self.format.position_kind)

    def _question(self, pieces: Sequence[int], room: int) -> list[int]:
        """The question, cut so that an answer of `room` pieces has its place behind it."""
        return self.format.vocabulary.text(pieces[: max(0, self.format.max_text - 1 - room)])


def _pieces(asked: Question, recipe: RowRecipe) -> AskedPieces:
    """The question behind its language, and the answer."""
    return recipe.text.encode(tagged(asked.question, asked.language)), recipe.text.encode(asked.answer)
