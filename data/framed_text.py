"""The text tokenizer of a published model: its tokenizer.json with the chat template that a prompt stands in.

Template and prompt are encoded together, since a piece may reach over the border of the two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.characters import whole_characters
from data.named_prompts import NAMES_FORMAT, NamedPrompts
from data.records import parse_json
from data.text import TextError, TextTokenizer
from data.web_captions import clean_web_caption

FORMAT = "mmwudao-text/1"
PROMPT = "{prompt}"  # where it stands in a template


class FramedTokenizer:
    """Prompts to the pieces of the filled template, by Hugging Face's tokenizers; no piece is added to them."""

    has_bytes = True

    def __init__(self, path: Path | str) -> None:
        """Load a file that `framed_text_file` made. Raises `TextError` when it is missing or damaged."""
        path = Path(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise TextError(f"cannot read the text tokenizer {path}: {error.strerror}") from error
        self._load(content, str(path))

    def _load(self, content: bytes, name: str) -> None:
        try:
            record = parse_json(content)
            template, self.vocab_size = record["template"], int(record["pieces"])
            fits = record["format"] == FORMAT and isinstance(template, str) and template.count(PROMPT) == 1
            self._cleans = bool(record.get("web_captions", False))
        except (ValueError, TypeError, KeyError):
            fits = False
        if not fits:
            raise TextError(f"the text tokenizer {name} is damaged: it is no {FORMAT} with a template")
        self._content, self.template = content, template
        self._tokenizer = _tokenizer(record["tokenizer"], name)
        self._marks = sorted(
            str(token) for token in self._tokenizer.get_added_tokens_decoder().values() if token.special
        )
        highest = max(self._tokenizer.get_vocab().values(), default=-1)
        if highest >= self.vocab_size:
            raise TextError(
                f"the text tokenizer {name} has the piece {highest}, and its model {self.vocab_size} pieces"
            )
        self.content_hash = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The pieces of the template around `text`, cleaned if the model's captions were.

        Raises `ValueError` for a text with one of the model's marks, or one of which cleaning leaves nothing.
        """
        text = whole_characters(text).strip()
        if self._cleans and not (text := clean_web_caption(text)):
            raise ValueError("nothing of the prompt is left for this model, which reads English: say it in English")
        for mark in self._marks:
            if mark in text:
                raise ValueError(f"the prompt holds {mark!r}, a mark that the model reads otherwise: leave it out")
        return self.encode_in(self.template, text)

    def encode_in(self, template: str, text: str) -> list[int]:
        """The pieces of another `template` around `text`, as it is."""
        ids: list[int] = self._tokenizer.encode(template.replace(PROMPT, text), add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The string of `ids`. Raises `ValueError` for ids outside."""
        outside = [piece for piece in ids if not 0 <= piece < self.vocab_size]
        if outside:
            raise ValueError(f"text piece {outside[0]} is outside 0..{self.vocab_size - 1}")
        text: str = self._tokenizer.decode([int(piece) for piece in ids])
        return text

    def piece(self, name: str) -> int | None:
        """The number of a piece by its name; None if there is none of that name."""
        number: int | None = self._tokenizer.token_to_id(name)
        return number

    def __reduce__(self) -> tuple[object, tuple[bytes]]:
        return _framed_from_bytes, (self._content,)


ModelText = TextTokenizer | FramedTokenizer | NamedPrompts


def load_model_text(path: Path | str) -> ModelText:
    """The text part of a model: text.model is SentencePiece, text.json says what it is. Raises `TextError`."""
    path = Path(path)
    if path.suffix != ".json":
        # byte pieces are not required: CogView's text model has none, and the hash shows that this is the right model
        return TextTokenizer(path, needs_bytes=False)
    try:
        named = parse_json(path.read_bytes())["format"] == NAMES_FORMAT
    except (OSError, ValueError, TypeError, KeyError):
        named = False  # the tokenizer says what is wrong
    return NamedPrompts(path) if named else FramedTokenizer(path)


def framed_text_file(
    tokenizer: Path | dict[str, Any], template: str, pieces: int, *, web_captions: bool = False
) -> bytes:
    """What `FramedTokenizer` reads: a tokenizer.json or its content, the template, and how many pieces the model has.

    `web_captions`: prompts are cleaned as `data.web_captions` does. Raises `TextError` for a tokenizer.json that is
    missing or damaged.
    """
    assert template.count(PROMPT) == 1
    record = _read(tokenizer) if isinstance(tokenizer, Path) else tokenizer
    _tokenizer(record, str(tokenizer) if isinstance(tokenizer, Path) else "the text tokenizer")
    whole = {"format": FORMAT, "template": template, "pieces": pieces, "tokenizer": record}
    if web_captions:
        whole["web_captions"] = True
    return json.dumps(whole, ensure_ascii=False).encode()


def _read(tokenizer: Path) -> object:
    try:
        return parse_json(tokenizer.read_bytes())
    except OSError as error:
        raise TextError(f"no text tokenizer at {tokenizer}: it comes with the weights") from error
    except ValueError as error:
        raise TextError(f"{tokenizer} is damaged: it is not JSON") from error


def _tokenizer(record: object, name: str) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(json.dumps(record))
    except Exception as error:  # tokenizers raises plain Exception
        reason = " ".join(str(error).split())[:120]
        raise TextError(f"{name} is damaged or no tokenizer of the tokenizers library ({reason})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _framed_from_bytes(content: bytes) -> FramedTokenizer:
    tokenizer = FramedTokenizer.__new__(FramedTokenizer)
    tokenizer._load(content, "the given bytes")
    return tokenizer
