"""Which filters run, and how: a section each."""

from __future__ import annotations

from dataclasses import dataclass, field

from data.clean.fit import FitSettings
from data.clean.judged import TextFilter
from data.clean.language import LanguageFilter, LanguageSettings
from data.clean.near_texts import NearTextSettings
from data.clean.privacy import PrivacyFilter, PrivacySettings
from data.clean.script import ScriptFilter, ScriptSettings
from data.clean.words import WordFilter, WordSettings
from data.options import option
from data.settings import NearSettings


@dataclass(frozen=True, kw_only=True)
class NearPictureSettings(NearSettings):
    """Pictures that are nearly the same, by their pHash and their colours."""

    on: bool = option(True, "Keep one of several pictures that are nearly the same; one of a test split stays first.")


@dataclass(frozen=True)
class CleanConfig:
    """The filters of `mmwudao data clean`, in the order in which they run."""

    language: LanguageSettings = field(default_factory=LanguageSettings)
    script: ScriptSettings = field(default_factory=ScriptSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    words: WordSettings = field(default_factory=WordSettings)
    near_texts: NearTextSettings = field(default_factory=NearTextSettings)
    near_pictures: NearPictureSettings = field(default_factory=lambda: NearPictureSettings(distance=4, colour=0.03))
    fit: FitSettings = field(default_factory=FitSettings)


def text_filters(config: CleanConfig) -> list[TextFilter]:
    """The filters of texts that are on. Raises `ModuleNotFoundError` for a library of the extra `clean`."""
    filters: list[TextFilter] = []
    if config.language.on:
        filters.append(LanguageFilter(config.language))
    if config.script.on:
        filters.append(ScriptFilter(config.script))
    if config.privacy.on:
        filters.append(PrivacyFilter(config.privacy))
    if config.words.on:
        filters.append(WordFilter(config.words))
    return filters
