"""The kinds of rows that a generator can learn, and how often it learns each."""

from __future__ import annotations

import math
from collections.abc import Mapping

from generation.rows.answer import AnswerRows
from generation.rows.base import RowKind
from generation.rows.describe import DescribeRows
from generation.rows.draw import DrawRows
from generation.rows.fill import FillRows
from generation.rows.match import MatchRows

# A new kind goes to the end: `Mixture.pick` starts there, and a kind of weight 0 changes no choice among the others.
KINDS = (DrawRows, DescribeRows, FillRows, AnswerRows, MatchRows)
ROW_KINDS: dict[str, type[RowKind]] = {kind.name: kind for kind in KINDS}


class Mixture:
    """Row kinds with weights, which are normalised: `shares` are positive and sum to 1."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Raises `ValueError` for an unknown kind, a weight that is negative or no number, or no weight above 0."""
        unknown = [name for name in weights if name not in ROW_KINDS]
        if unknown:
            raise ValueError(f"mix: unknown kind of rows {unknown[0]!r}; use {', '.join(ROW_KINDS)}")
        wrong = [name for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)]
        if wrong:
            raise ValueError(f"mix.{wrong[0]} must be a number of at least 0, not {weights[wrong[0]]}")
        total = math.fsum(weights.values())
        if not total:
            raise ValueError("mix needs a kind of rows with a weight above 0")
        self.shares = {name: weights[name] / total for name in ROW_KINDS if weights.get(name)}

    def pick(self, chance: float) -> str:
        """The kind for a random number `chance` in [0, 1): the last kind has the lowest part of that range."""
        end = 0.0
        for name in reversed(self.shares):
            end += self.shares[name]
            if chance < end:
                return name
        return next(iter(self.shares))  # rounding may leave the sum of the shares just below 1
