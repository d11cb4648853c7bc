"""Text to pieces and back: a SentencePiece unigram model (Kudo & Richardson 2018, Kudo 2018) with byte fallback.

What the vocabulary lacks is spelled in UTF-8 bytes, so every string has ids: emoji, right-to-left text, rare scripts.
"""

from __future__ import annotations

import hashlib
import io
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from data.atomic import write_file
from data.characters import whole_characters
from data.sample import DataError

SPACE_MARK = "\u2581"  # how SentencePiece writes a space inside a piece
STAND_IN = "\ufdd0"  # a Unicode noncharacter, never in text: holds the place of a literal SPACE_MARK


class TextError(DataError):
    """A text tokenizer cannot be trained, or its file is missing or damaged."""


class TextTokenizer:
    """Ids 0..vocab_size-1: 0 is never produced (SentencePiece asks for an unknown piece), 1..256 are the bytes.

    `decode(encode(text))` is the NFKC form of `text` (Unicode Annex 15), with lone surrogates as U+FFFD.
    """

    def __init__(self, path: Path | str, *, needs_bytes: bool = True) -> None:
        """Load a SentencePiece model file. Raises `TextError` when it is missing or damaged.

        A model without byte pieces is refused too, unless `needs_bytes` is false. Such a model (CogView's has none)
        encodes as SentencePiece alone does: characters it does not know become its unknown piece.
        """
        path = Path(path)
        try:
            model = path.read_bytes()
        except OSError as error:
            raise TextError(f"cannot read the text tokenizer {path}: {error.strerror}") from error
        self._load(model, str(path), needs_bytes)

    @classmethod
    def from_bytes(
        cls, model: bytes, name: str = "the given bytes", needs_bytes: bool = True
    ) -> TextTokenizer:
        """Load a serialised SentencePiece model; `name` is what an error calls it."""
        tokenizer = cls.__new__(cls)
        tokenizer._load(model, name, needs_bytes)
        return tokenizer

    @classmethod
    def train(
        cls, captions: Iterable[str], path: Path | str, vocab_size: int, *, character_coverage: float = 0.9999
    ) -> TextTokenizer:
        """Train on `captions`, write the model file atomically, load it.

        The same captions in the same order give the same bytes. The vocabulary is smaller than `vocab_size` when the
        captions hold too few different pieces. Characters outside `character_coverage` (a fraction of all characters)
        are left to the byte pieces. Raises `TextError` for no captions or a vocabulary too small for its characters.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_training_text(captions),
                model_writer=model,
                model_type="unigram",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                character_coverage=character_coverage,
                byte_fallback=True,
                normalization_rule_name="nfkc",
                # both keep decode(encode(text)) exact
                remove_extra_whitespaces=False,
                add_dummy_prefix=True,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                # one thread and every caption in order: the sums of the EM steps are the same each time
                num_threads=1,
                input_sentence_size=0,
                shuffle_input_sentence=False,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).rpartition("] ")[2].strip() or "there is no caption to learn from"
            raise TextError(f"cannot train a text tokenizer of {vocab_size} pieces: {reason}") from error
        tokenizer = cls.from_bytes(model.getvalue())
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, tokenizer._model)
        return tokenizer

    def _load(self, model: bytes, name: str, needs_bytes: bool) -> None:
        damaged = f"the text tokenizer {name} is damaged or no SentencePiece model; fetch or train it again"
        if not model:  # SentencePiece would take this for a model without pieces
            raise TextError(damaged)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TextError(damaged) from error
        self._model = model
        self.vocab_size: int = self._processor.vocab_size()
        self.has_bytes = self.vocab_size >= 257 and all(self._processor.is_byte(piece) for piece in range(1, 257))
        if needs_bytes and not self.has_bytes:
            raise TextError(f"the text tokenizer {name} has no byte pieces at ids 1..256; train it with byte fallback")
        self.content_hash = hashlib.sha256(model).hexdigest()

    @property
    def serialised(self) -> bytes:
        """The model file's content, which `from_bytes` reads."""
        return self._model

    def encode(self, text: str) -> list[int]:
        """The ids of any string; the empty string has none."""
        if not self.has_bytes:
            return self._processor.encode(whole_characters(text))
        text = _normalise(text)
        if SPACE_MARK not in text:
            return self._processor.encode(text)
        # SentencePiece reads the mark as a space: encode a stand-in, then put the mark's three bytes in its place
        ids = self._processor.encode(text.replace(STAND_IN, "\ufffd").replace(SPACE_MARK, STAND_IN))
        stand_in, mark = ([1 + byte for byte in character.encode()] for character in (STAND_IN, SPACE_MARK))
        for start in range(len(ids) - 2):
            if ids[start : start + 3] == stand_in:
                ids[start : start + 3] = mark
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The string of `ids`; byte pieces that are not UTF-8 become U+FFFD. Raises `ValueError` for ids outside."""
        outside = [piece for piece in ids if not 0 <= piece < self.vocab_size]
        if outside:
            raise ValueError(f"text piece {outside[0]} is outside 0..{self.vocab_size - 1}")
        return self._processor.decode([int(piece) for piece in ids])

    def __reduce__(self) -> tuple[object, tuple[bytes, str, bool]]:
        return TextTokenizer.from_bytes, (self._model, "the given bytes", self.has_bytes)


def _normalise(text: str) -> str:
    """NFKC. The model applies its own NFKC table after this; Python's also reorders stacks of combining marks."""
    return unicodedata.normalize("NFKC", whole_characters(text))


def _training_text(captions: Iterable[str]) -> Iterator[str]:
    for caption in captions:
        # the marks must stay out of the vocabulary, see `encode`; the trainer refuses NUL
        text = _normalise(caption).translate({ord(SPACE_MARK): " ", ord(STAND_IN): " ", 0: " "})
        if text := " ".join(text.split()):
            yield text
