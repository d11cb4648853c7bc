"""BERT's word pieces, in the two variants of the published towers."""

from __future__ import annotations

import logging
import unicodedata

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor

from data.characters import whole_characters
from vqvae.storage.parts import ModelError

PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
SPECIAL = (PAD, UNKNOWN, START, END, "[MASK]")

log = logging.getLogger(__name__)


class WordPieces:
    """Tokenizes texts: lower case, no accents, CJK characters as words, then the longest pieces from the left.

    `google` selects the original code, which Chinese-CLIP ships: words above 200 characters are unknown, names of
    special tokens in a text are ordinary text, and only control and format characters are dropped. Otherwise the rules
    are those of Hugging Face, which BriVL uses: the limit is 100 characters, names of special tokens become those
    tokens, and unassigned and private-use characters are dropped too. Raises `ModelError` for a damaged vocabulary.
    """

    def __init__(self, vocab: bytes, google: bool) -> None:
        try:
            lines = vocab.decode("utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise ModelError("vocab.txt is damaged: it is not UTF-8") from error
        pieces = {line.strip(): index for index, line in enumerate(lines)}
        if missing := [name for name in SPECIAL[:4] if name not in pieces]:
            raise ModelError(f"vocab.txt is not a BERT vocabulary: {', '.join(missing)} is missing")
        self.size = len(lines)
        self._google = google
        self._pad, self._start, self._end = pieces[PAD], pieces[START], pieces[END]
        model = WordPiece(pieces, unk_token=UNKNOWN, max_input_chars_per_word=200 if google else 100)
        self._tokenizer = Tokenizer(model)
        self._tokenizer.normalizer = BertNormalizer(
            clean_text=not google, handle_chinese_chars=True, strip_accents=True, lowercase=not google
        )
        self._tokenizer.pre_tokenizer = BertPreTokenizer()
        if not google:
            self._tokenizer.add_special_tokens([name for name in SPECIAL if name in pieces])

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text, without [CLS] and [SEP]."""
        tokens: list[str] = self._tokenizer.encode(self._clean(text)).tokens
        return tokens

    def __call__(self, texts: list[str], length: int) -> Tensor:
        """[CLS] pieces [SEP], padded to `length`: int64 [N, length]. Longer texts are cut, with a warning."""
        ids = torch.full((len(texts), length), self._pad)
        cut = 0
        encodings = self._tokenizer.encode_batch([self._clean(text) for text in texts])
        for row, encoding in zip(ids, encodings, strict=True):
            cut += len(encoding.ids) > length - 2
            sequence = [self._start, *encoding.ids[: length - 2], self._end]
            row[: len(sequence)] = torch.tensor(sequence)
        warn_cut(cut, len(texts), length)
        return ids

    def _clean(self, text: str) -> str:
        text = whole_characters(text)
        if not self._google:
            return text
        kept = (" " if char in "\t\n\r" else char for char in text if char in "\t\n\r" or not _dropped(char))
        return "".join(kept).lower()


def warn_cut(cut: int, total: int, length: int) -> None:
    """Log a warning if any of `total` texts was cut to `length` tokens."""
    if cut:
        log.warning("%d of %d texts are longer than %d tokens and were cut", cut, total, length)


def _dropped(char: str) -> bool:
    return char in "\0\ufffd" or unicodedata.category(char) in ("Cc", "Cf")
