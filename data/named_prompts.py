"""The text part of a model that draws a closed list of things: classes, or prompts whose vectors are stored with it."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.records import parse_json
from data.text import TextError

NAMES_FORMAT = "mmwudao-names/1"
SHOWN = 3  # names in one message


class NamedPrompts:
    """Prompts to one piece each, the number of the thing. Capitals and spaces do not count."""

    has_bytes = False

    def __init__(self, path: Path | str) -> None:
        """Load a file that `named_prompts_file` made. Raises `TextError` when it is missing or damaged."""
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise TextError(f"cannot read the names {path}: {error.strerror}") from error
        self._load(content, str(path))

    def _load(self, content: bytes, name: str) -> None:
        try:
            record = parse_json(content)
            fits = record["format"] == NAMES_FORMAT and isinstance(record["what"], str)
            self.what, self.names = record["what"], [[str(one) for one in names] for names in record["names"]]
        except (ValueError, TypeError, KeyError):
            fits = False
        if not fits or not self.names:
            raise TextError(f"the names {name} are damaged: this is no {NAMES_FORMAT}")
        self.vocab_size = len(self.names)
        self._numbers: dict[str, list[int]] = {}
        for number, names in enumerate(self.names):
            for one in {_folded(one) for one in names} - {""}:
                self._numbers.setdefault(one, []).append(number)
        self._content = content
        self.content_hash = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The number of the thing that is named so, or that has this number. Raises `ValueError` for no or several."""
        asked = _folded(text)
        found = self._numbers.get(asked, [])
        if not found and asked.isascii() and asked.isdigit() and int(asked) < self.vocab_size:
            found = [int(asked)]
        if len(found) == 1:
            return found
        if found:
            raise ValueError(f"{text!r} names the {self.what} {' and '.join(map(str, found))}: give the number")
        close = difflib.get_close_matches(asked, self._numbers, SHOWN) or list(self._numbers)[:SHOWN]
        such = f", such as {', '.join(map(repr, close))}" if close else ""
        raise ValueError(
            f"this model draws no {self.what} {text!r}: give one of its {self.vocab_size}, by name or by number from 0 "
            f"to {self.vocab_size - 1}{such}"
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The first names of the things with these numbers. Raises `ValueError` for numbers outside."""
        outside = [number for number in ids if not 0 <= number < self.vocab_size]
        if outside:
            raise ValueError(f"number {outside[0]} is outside 0..{self.vocab_size - 1}")
        return ", ".join(self.names[number][0] if self.names[number] else str(number) for number in ids)

    def __reduce__(self) -> tuple[object, tuple[bytes]]:
        return _from_bytes, (self._content,)


def named_prompts_file(what: str, names: Sequence[Sequence[str]]) -> bytes:
    """What `NamedPrompts` reads: the names of each thing, none where only its number is known.

    `what` says what the things are, in the singular.
    """
    record: Mapping[str, object] = {"format": NAMES_FORMAT, "what": what, "names": [list(some) for some in names]}
    return json.dumps(record, ensure_ascii=False).encode()


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _from_bytes(content: bytes) -> NamedPrompts:
    names = NamedPrompts.__new__(NamedPrompts)
    names._load(content, "the given bytes")
    return names
