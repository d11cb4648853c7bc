"""Which split a picture belongs to, by hash alone, and which names other recipes must keep out of their training."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from data.recipes.concepts import Concept, slug

SPLITS = ("train", "test-concept", "test-family")
HELD_OUT = 0.05


def split_of(base_concept: str, family: str) -> str:
    """The split of a picture, by hash alone, so that it never depends on what else is built.

    `test-concept`: 5 % of base concepts, in all families. `test-family`: 5 % of the remaining (base concept, family)
    pairs; the concept is then seen in training in another family.
    """
    if _fraction(f"concept:{base_concept}") < HELD_OUT:
        return "test-concept"
    if _fraction(f"family:{base_concept}:{family}") < HELD_OUT:
        return "test-family"
    return "train"


def stable_hash(text: str) -> str:
    """SHA-256 of a text, in hex: an order and a chance that two builds agree on."""
    return hashlib.sha256(text.encode()).hexdigest()


def _fraction(text: str) -> float:
    return int(stable_hash(text)[:15], 16) / 16**15


class HeldOutNames:
    """The English names of the concepts in the emoji set's `test-concept`, to keep other pictures of them away."""

    def __init__(self, concepts: Iterable[Concept]) -> None:
        self.names: set[tuple[str, ...]] = set()
        self.keywords: set[tuple[str, ...]] = set()
        for concept in concepts:
            if split_of(concept.base, "") == "test-concept":
                caption = concept.captions["en"]
                self.names.add(_words(caption.name))
                self.keywords.update(_words(word) for word in caption.keywords)
        self.names.discard(())
        self._longest = max(map(len, self.names), default=0)

    def shown_by(self, name: str) -> bool:
        """Whether a picture of that English name may show a held-out concept.

        So it is taken where the name holds the whole name of one ("alarm clock off"), or is one of its keywords.
        """
        words = _words(name)
        runs = (
            words[start : start + length]
            for length in range(1, self._longest + 1)
            for start in range(len(words) - length + 1)
        )
        return words in self.keywords or any(run in self.names for run in runs)


def _words(name: str) -> tuple[str, ...]:
    """The words of an English name in lower case without a plural's ending, so that "clocks" is "clock"."""
    return tuple(re.sub(r"(?<=[a-z]{2}[^s])s$", "", word) for word in slug(name).split("-") if word)
