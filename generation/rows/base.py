"""The interface of a row kind: one thing that a generator can learn, such as to draw or to describe, as rows of tokens.

Shapes: T tokens in a row, h x w codes in a picture.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from data.sample import Sample
from generation.rows.prompt import FeatureSource
from generation.rows.row import PositionKind, Row
from generation.rows.texts import CaptionMix
from generation.rows.vocabulary import Vocabulary


class RowFormat(Protocol):
    """What a model fixes about its rows; a `TransformerConfig` is one."""

    @property
    def max_text(self) -> int: ...  # the most pieces of text in a row

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def position_kind(self) -> PositionKind: ...


class PieceEncoder(Protocol):
    """Texts to raw text pieces: a `TextTokenizer`, or one that puts prompt vectors in front."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class CodedPicture:
    """A sample and the codes [h, w] of its picture."""

    sample: Sample
    codes: Tensor


@dataclass(frozen=True)
class RowRecipe:
    """How training rows are made. See `GeneratorTrainConfig` for the meaning of the numbers.

    `features` gives the vectors of prompts, for a generator that reads them.
    """

    text: PieceEncoder
    captions: CaptionMix
    code_noise: float = 0.0
    code_mask: float = 0.0
    features: FeatureSource | None = None
    from_picture: float = 0.0
    match_texts: int = 1


@dataclass(frozen=True)
class Chance:
    """The random choices for one training row.

    `rng` belongs to the row. `given` is the share of the codes that every row of this step is given; `other_codes`
    draws the codes [h, w] of a random picture with `rng`.
    """

    rng: random.Random
    given: float
    other_codes: Callable[[random.Random], Tensor]


@dataclass(frozen=True)
class Given:
    """What a prompt holds: raw text pieces, and the size (h, w) or the codes [h, w] of the picture."""

    text: Sequence[int]
    grid: tuple[int, int]
    codes: Tensor | None = None


class RowKind(ABC):
    """A kind of rows for models of one format. A batch holds rows of one kind only."""

    name: ClassVar[str]  # in `mix` of a training configuration
    needs_caption: ClassVar[bool]  # a row of any kind needs the codes of a picture, and one of this kind a caption too
    lacking: ClassVar[str] = "caption"  # what a picture has not that cannot become such a row

    def __init__(self, format: RowFormat) -> None:
        self.format = format

    def suits(self, sample: Sample) -> bool:
        """Whether `sample`, whose picture has codes, can become a row of this kind."""
        return bool(sample.captions) or not self.needs_caption

    @abstractmethod
    def training_row(self, picture: CodedPicture, recipe: RowRecipe, chance: Chance) -> Row:
        """A row to learn from, with captions and noise drawn by `chance`."""

    @abstractmethod
    def held_out_row(self, picture: CodedPicture, recipe: RowRecipe, named_style: bool) -> Row:
        """The row to measure a model on: no noise, and a language chosen by the sample's id, whatever `recipe` says.

        `named_style` says whether a caption names the family, where this kind of rows can.
        """

    @abstractmethod
    def prompt(self, given: Given) -> list[int]:
        """The tokens of a row up to where the model takes over."""

    @abstractmethod
    def positions(self, num_text: int, grid: tuple[int, int]) -> Tensor:
        """Positions of a whole row with `num_text` pieces of text: [T] ("sequence") or [T, 2] ("grid")."""
