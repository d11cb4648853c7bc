"""Text as files hold it, and text that every tokenizer can encode."""

from __future__ import annotations

import codecs
import unicodedata

BYTE_ORDER_MARK = "\ufeff"
BLANK_CATEGORIES = frozenset(("Zs", "Zl", "Zp", "Mn", "Mc", "Me", "Cc", "Cf"))
FILLERS = "\u115f\u1160\u3164\uffa0\u2800"  # letters, and a symbol, that are blank
# the marks of UTF-32 first: that of UTF-16 is the beginning of one of them
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# which of the first four bytes are not zero
_UNMARKED = {
    (True, False): "utf-16-le",  # a file of one character
    (False, True): "utf-16-be",
    (True, False, True, False): "utf-16-le",
    (False, True, False, True): "utf-16-be",
    (True, False, False, False): "utf-32-le",
    (False, False, False, True): "utf-32-be",
}


def encoding_of(data: bytes) -> str:
    """The codec of a text file by its first four bytes: what a byte order mark names, else UTF-8.

    Without a mark, text of UTF-16 or UTF-32 that begins with ASCII is known by the places of its zero bytes.
    """
    marked = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), None)
    return marked or _UNMARKED.get(tuple(map(bool, data[:4])), "utf-8-sig")


def decode_text(data: bytes) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32 (see `encoding_of`); a byte order mark is no part of it.

    Raises `UnicodeDecodeError` (a `ValueError`) for other bytes.
    """
    return data.decode(encoding_of(data)).removeprefix(BYTE_ORDER_MARK)


def is_blank(text: str) -> bool:
    """Whether nothing of `text` can be seen: spaces, control and format characters, marks and fillers alone."""
    for c in text:  # its first character answers as a rule, and a sample has dozens of texts
        if c not in FILLERS and unicodedata.category(c) not in BLANK_CATEGORIES:
            return False
    return True


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8: it holds no half of a surrogate pair, which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole_characters(text: str) -> str:
    """`text` with a pair of surrogates as its character, and a lone surrogate, which UTF-8 cannot encode, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
