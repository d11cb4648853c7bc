"""Texts that are nearly the same, by datasketch: MinHash and locality-sensitive hashing (Broder 1997)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data.options import check_options, option


@dataclass(frozen=True)
class NearTextSettings:
    """Texts that nearly repeat another one. Off: captions of pictures repeat each other by right."""

    on: bool = option(False, "Keep one of several nearly equal texts; for texts alone, not for captions.")
    similarity: float = option(0.8, "Call texts nearly equal from this Jaccard similarity of their n-grams on.",
                               above=0, most=1)  # fmt: skip
    characters: int = option(5, "Compare sequences of this many characters.", least=1)
    permutations: int = option(128, "Hash functions of a MinHash.", least=16)

    def __post_init__(self) -> None:
        check_options(self)


def near_texts(texts: Sequence[tuple[str, str]], settings: NearTextSettings) -> list[tuple[int, int]]:
    """Pairs of indices of (language, text) that are nearly equal, within one language; the smaller index first."""
    from datasketch import MinHash, MinHashLSH

    indexes = {
        language: MinHashLSH(threshold=settings.similarity, num_perm=settings.permutations)
        for language in {language for language, _ in texts}
    }
    pairs: list[tuple[int, int]] = []
    hashes: list[MinHash] = []
    for number, (language, text) in enumerate(texts):
        made = MinHash(num_perm=settings.permutations, seed=1)
        made.update_batch([gram.encode() for gram in sorted(_grams(text, settings.characters))])
        for other in indexes[language].query(made):
            if hashes[other].jaccard(made) >= settings.similarity:
                pairs.append((other, number))
        indexes[language].insert(number, made)
        hashes.append(made)
    return pairs


def _grams(text: str, length: int) -> set[str]:
    plain = " ".join(text.casefold().split())
    return {plain[start : start + length] for start in range(max(1, len(plain) - length + 1))}
