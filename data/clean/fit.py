"""Captions that fit their picture least, by the cosine of towers that the caller passes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.options import check_options, option

# pictures and one text for each -> the cosine of each pair [N]
FitScore = Callable[[list[Image.Image], list[str]], NDArray[np.float32]]


@dataclass(frozen=True)
class FitSettings:
    """Captions that fit their picture least, where towers are given to judge it."""

    on: bool = option(True, "Drop the captions that fit their picture least, where towers are given.")
    share: float = option(0.02, "Drop this share of each language's captions.", least=0, below=1)

    def __post_init__(self) -> None:
        check_options(self)


def worst_fits(scores: Sequence[tuple[str, float]], share: float) -> set[int]:
    """The indices of the `share` of lowest scores within each language, of (language, score)."""
    worst: set[int] = set()
    for language in {language for language, _ in scores}:
        members = [number for number, (other, _) in enumerate(scores) if other == language]
        members.sort(key=lambda number: (scores[number][1], number))
        worst.update(members[: int(share * len(members))])
    return worst
