"""A picture family is named in the caption's own language, so a prompt can name it too."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

from data.sample import Caption

LANGUAGES = ("zh", "en", "fr", "de", "cs", "ja", "ko")

STYLE_PHRASES = {
    "zh": "{caption}, {family} 风格",
    "en": "{caption}, {family} style",
    "fr": "{caption}, style {family}",
    "de": "{caption}, {family} Stil",
    "cs": "{caption}, styl {family}",
    "ja": "{caption}, {family} スタイル",
    "ko": "{caption}, {family} 스타일",
}


def with_style(caption: str, family: str, language: str = "en") -> str:
    """`caption` with the family named in `language` (English for a language without a phrase of ours)."""
    return STYLE_PHRASES.get(language, STYLE_PHRASES["en"]).format(caption=caption, family=family)


def without_style(text: str, families: Iterable[str]) -> str:
    """`text` without the phrase that `with_style` ends it with, if it names one of `families`."""
    for family in families:
        for phrase in STYLE_PHRASES.values():
            end = phrase.format(caption="", family=family)
            if text.endswith(end) and len(text) > len(end):
                return text.removesuffix(end)
    return text


def tagged(caption: str, language: str) -> str:
    """`caption` behind the language it is in, as a generator learns to describe pictures in a chosen language."""
    return f"{language}: {caption}"


def draw_text(caption: Caption, name: float, keywords: float, rng: random.Random) -> str:
    """The name (with probability `name`), some keywords in random order (`keywords`), or the name and some keywords.

    Where there are other captions, one of all is drawn as the name.
    """
    draw = rng.random()
    said = rng.choice((caption.name, *caption.others)) if caption.others else caption.name
    if draw < name or not caption.keywords:
        return said
    words = rng.sample(caption.keywords, rng.randint(1, min(4, len(caption.keywords))))
    if draw >= name + keywords:
        words.insert(0, said)
    return ", ".join(words)


def guess_language(text: str) -> str:
    """The language whose phrase names a style in `text`: by script, then by letters and articles; else English."""
    for language, pattern in _LANGUAGE_SIGNS:
        if pattern.search(text):
            return language
    return "en"


_LANGUAGE_SIGNS = [
    (language, re.compile(pattern, re.IGNORECASE))
    for language, pattern in (
        ("ko", r"[\u1100-\u11ff\uac00-\ud7af]"),
        ("ja", r"[\u3040-\u30ff]"),  # kana; Chinese characters alone are read as Chinese
        ("zh", r"[\u3400-\u9fff]"),
        ("cs", r"[ěřůčďťňšž]"),
        ("de", r"[äöüß]|\b(?:ein|eine|der|die|das|mit|und)\b"),
        ("fr", r"[éèêëàâçîïôûùœ]|\b(?:un|une|le|la|les|du|des|avec|et)\b"),
    )
]
