"""What a filter of captions does: it keeps a text, changes it, or says why it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from data.sample import Caption, Sample


class TextFilter(Protocol):
    """A filter of texts: `reason` is what a dropped text is counted under."""

    reason: str

    def judge(self, text: str, language: str) -> str | None:
        """The text to keep, changed or not, or None to drop it."""


@dataclass(frozen=True)
class Dropped:
    """A text that a filter took out of a sample."""

    reason: str
    language: str
    text: str


def filter_captions(sample: Sample, filters: list[TextFilter], note: Callable[[Dropped], None]) -> Sample:
    """The sample with the captions that every filter keeps; what goes is told to `note`.

    A name that goes takes its caption with it. A keyword goes alone.
    """
    captions = {}
    for language, caption in sample.captions.items():
        name = _passed(caption.name, language, filters, note)
        if name is not None:
            keywords = (_passed(keyword, language, filters, note) for keyword in caption.keywords)
            captions[language] = Caption(name, tuple(keyword for keyword in keywords if keyword is not None))
    return replace(sample, captions=captions)


def _passed(text: str, language: str, filters: list[TextFilter], note: Callable[[Dropped], None]) -> str | None:
    for one in filters:
        kept = one.judge(text, language)
        if kept is None:
            note(Dropped(one.reason, language, text))
            return None
        text = kept
    return text
