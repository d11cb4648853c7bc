"""What a search looks for: texts and pictures with weights, which are added and subtracted as vectors."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
from numpy.typing import NDArray
from PIL import Image

from data.photos.files import RAW_SUFFIXES, STANDARD_SUFFIXES
from retrieval.collections.base import CollectionError

MAX_TERMS = 32
MAX_WEIGHT = 1e6
LEAST_LENGTH = 1e-4  # of the sum: below, the terms cancel out and what is left is rounding
SIGNS = {"+": 1.0, "-": -1.0}
# `2*a beach`, or `2:a beach`; a digit after the colon makes it a time or a ratio
WEIGHTED = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:\*|:(?!\d))\s*(.*)", re.DOTALL)
PATH_START = re.compile(r"\.{0,2}[/\\]|~[/\\]|[A-Za-z]:[/\\]")


@dataclass(frozen=True)
class Term:
    """A text, a picture (decoded, or the path of a file) or a vector; its vector of length 1 counts `weight` times.

    Raises `CollectionError` for an empty text, or a weight that is 0, not finite or beyond `MAX_WEIGHT`.
    """

    content: str | Path | Image.Image | NDArray[numpy.floating]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.content, str) and not self.content.strip():
            raise CollectionError("an empty text: say what to look for")
        if not (math.isfinite(self.weight) and 0 < abs(self.weight) <= MAX_WEIGHT):
            raise CollectionError(f"a weight is a number other than 0, at most {MAX_WEIGHT:g}: not {self.weight:g}")


@dataclass(frozen=True)
class Query:
    """The sum of one or more terms. Raises `CollectionError` for none, or for more than `MAX_TERMS`."""

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.terms) <= MAX_TERMS:
            raise CollectionError(f"a search looks for 1 to {MAX_TERMS} texts and pictures, not {len(self.terms)}")

    @property
    def files(self) -> list[Path]:
        """The picture files among the terms."""
        return [term.content for term in self.terms if isinstance(term.content, Path)]


def split_query(text: str) -> list[str]:
    """The words that `read_query` reads, of a text in one line: signs stand between spaces, or begin it."""
    return [part.strip() for part in re.split(r"(?:^|(?<=\s))([+-])(?=\s|$)", text) if part.strip()]


def read_query(words: Sequence[str], *, files: bool = True) -> Query:
    """A query as it is typed: terms with the signs `+` and `-` between them as words of their own.

    A term may begin with its weight, `2*` or `2:`. With `files`, it is the picture at a path if it begins as one does
    (`./`, `../`, `/`, `~/`, `C:\\`), or if it names an existing file with the suffix of a picture; otherwise a text.
    Raises `CollectionError` if a sign or a term is missing, or for a path where no file is.
    """
    terms: list[Term] = []
    sign: str | None = None
    for word in words:
        if word in SIGNS:
            if sign is not None:
                raise CollectionError(f"{sign} {word}: a text or a picture is missing between the two signs")
            sign = word
        elif terms and sign is None:
            raise CollectionError(f"{word!r}: a + or - is missing before it (or quotes around a text of several words)")
        else:
            terms.append(_read_term(word, SIGNS[sign or "+"], files))
            sign = None
    if sign is not None:
        raise CollectionError(f"a text or a picture is missing after the {sign}")
    if not terms:
        raise CollectionError("nothing to search for: give a text or --image")
    return Query(tuple(terms))


def _read_term(word: str, sign: float, files: bool) -> Term:
    match = WEIGHTED.fullmatch(word)
    weight, content = (float(match[1]), match[2]) if match else (1.0, word)
    if not files:
        return Term(content, sign * weight)
    if content.startswith(("http://", "https://")):
        raise CollectionError(f"{content}: a search reads no addresses: save the picture, and give its path")
    path = Path(content).expanduser() if content.strip() else Path()
    if PATH_START.match(content):
        if not path.is_file():
            raise CollectionError(f"no picture at {path}")
        return Term(path, sign * weight)
    is_picture = path.suffix.lower() in STANDARD_SUFFIXES | RAW_SUFFIXES and path.is_file()
    return Term(path if is_picture else content, sign * weight)
