"""Text that every tokenizer can encode."""

from __future__ import annotations


def whole_characters(text: str) -> str:
    """`text` with a pair of surrogates as its character, and a lone surrogate, which UTF-8 cannot encode, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
