"""Captions as text encoders were shown them that learned from pages of the web: lower case, without what is no caption.

The rules are those with which DeepFloyd IF, PixArt and LlamaGen cleaned theirs. A prompt must be cleaned in the same
way, or its encoder reads what the generator has never seen. English is what these models know: CJK characters go.
"""

from __future__ import annotations

import html
import re
import unicodedata
from urllib.parse import unquote_plus

_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_BEFORE: list[tuple[str, str]] = [
    (r"<person>", "person"),
    (r"\bhttps?:(?:/{1,3}|[a-z\d%])", ""),
    (rf"\b[a-z\d.\-]+\.(?:{_DOMAINS})[\w/-]*\b/?(?!@)", ""),
    (r"<[^<>]*>", ""),
]
_MARKS: list[tuple[str, str]] = [
    (r"@\w+\b", ""),
    ("[\u31c0-\u4dff\u4e00-\u9fff]+", ""),  # CJK and what belongs to it
    (
        "[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
        "\ufe63\uff0d]+",
        "-",
    ),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
_REMAINS: list[tuple[str, str]] = [
    (r"\b[a-z]{1,3}\d{3,15}\b", ""),  # numbers of goods
    (r"\b[a-z]+\d+[a-z]+\b", ""),
    (r"\b\d+[a-z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]


def clean_web_caption(text: str) -> str:
    """The caption that an encoder of such captions reads of `text`; empty where nothing of it is left."""
    # twice, as the models' makers do: what is left of one rule may meet another
    return _cleaned(_cleaned(text))


def _cleaned(text: str) -> str:
    text = html.unescape(_replaced(unquote_plus(text).strip().lower(), _BEFORE))
    text = _replaced(text, _MARKS)
    if len(re.findall("[-_]", text)) > 3:  # words joined by them
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", text))).strip()
    return _replaced(text, _REMAINS).strip()


def _replaced(text: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text
