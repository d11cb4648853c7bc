"""Texts with a listed word, by the lists of the npm package `naughty-words` (Shutterstock's; CC BY 4.0)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from data.options import option
from data.recipes.npm import Package, default_cache, fetch_package, read_json
from data.styles import LANGUAGES

LISTED_WORDS = Package(
    "naughty-words",
    "1.2.0",
    "sha512-0iadX6fN+3NsfvIRtWmmpEX9VsoIQ6n9FwyIxmew9w5yzFNqMgs/Ky0eAC/z5xXSHtqlVoByiovdROikwH9SXQ==",
)
_UNSPACED = ("zh", "ja", "ko")  # no spaces, or words with endings: a listed word counts anywhere in the text


@dataclass(frozen=True)
class WordSettings:
    """Texts with a word of the lists of `naughty-words`."""

    on: bool = option(True, "Drop texts with a listed word of their language. Needs the npm client once.")
    allowed: tuple[str, ...] = option((), "Words that may stay although they are listed.")
    cache: str | None = option(None, "Keep the fetched lists in this folder.")


class WordFilter:
    """Drops a text that holds a listed word of its language, whole and in any case."""

    reason = "listed word"

    def __init__(self, settings: WordSettings) -> None:
        cache = Path(settings.cache) if settings.cache else default_cache()
        lists = read_json(fetch_package(LISTED_WORDS, cache), [f"{language}.json" for language in LANGUAGES])
        allowed = {word.casefold() for word in settings.allowed}
        self._patterns = {
            language: _pattern([word for word in lists[f"{language}.json"] if word.casefold() not in allowed], language)
            for language in LANGUAGES
        }

    def judge(self, text: str, language: str) -> str | None:
        """See `TextFilter`."""
        pattern = self._patterns.get(language)
        return None if pattern is not None and pattern.search(text) else text


def _pattern(words: list[str], language: str) -> re.Pattern[str]:
    # a single character of an unspaced language is part of too many other words
    words = [word for word in words if word and not (language in _UNSPACED and len(word) < 2)]
    either = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or "$^"
    return re.compile(either if language in _UNSPACED else rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE)
