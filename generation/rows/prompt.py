"""A prompt: what the model reads before the codes.

Shapes: n vectors of C numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, overload

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prompt(Sequence[int]):
    """Raw text pieces with the vectors of frozen towers [n, C] that go with them.

    It is a sequence of its pieces: whatever takes raw pieces takes a prompt, and passes the vectors on.
    """

    pieces: tuple[int, ...]
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pieces)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[int, ...]: ...
    def __getitem__(self, place: int | slice) -> int | tuple[int, ...]:
        return self.pieces[place]


class FeatureSource(Protocol):
    """Where the vectors of prompts come from: a file in training, the towers themselves when drawing."""

    @property
    def width(self) -> int:
        """C"""

    def of_text(self, text: str) -> Tensor:
        """Float32 [n, C] of a caption, or of a prompt, without its style phrase (`data.styles.without_style`)."""

    def of_sample(self, id: str) -> Tensor:
        """Float32 [n, C] of the picture of a sample of the training; a loaded model knows none."""
