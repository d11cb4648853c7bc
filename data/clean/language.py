"""Texts in another language than their tag says, by py3langid (a naive Bayes classifier over byte n-grams)."""

from __future__ import annotations

from dataclasses import dataclass

from data.options import check_options, option
from data.sample import UNKNOWN_LANGUAGE
from data.styles import LANGUAGES


@dataclass(frozen=True)
class LanguageSettings:
    """Texts in another language than their tag says."""

    on: bool = option(True, "Drop texts that py3langid takes for another language than their tag.")
    least_characters: int = option(20, "Judge texts of at least this many characters; shorter ones stay.", least=1)
    least_cjk: int = option(6, "The same for zh, ja and ko, whose characters say more.", least=1)
    certainty: float = option(0.9, "Drop when another language is at least this likely.", least=0.5, most=1)

    def __post_init__(self) -> None:
        check_options(self)


class LanguageFilter:
    """Drops a text whose language is surely another one; texts tagged `und` or with other languages than ours stay."""

    reason = "another language than its tag"

    def __init__(self, settings: LanguageSettings) -> None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self.settings = settings
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        self._identifier.set_languages(list(LANGUAGES))

    def judge(self, text: str, language: str) -> str | None:
        """See `TextFilter`."""
        least = self.settings.least_cjk if any(ord(c) >= 0x3040 for c in text) else self.settings.least_characters
        if language == UNKNOWN_LANGUAGE or language not in LANGUAGES or len(text) < least:
            return text
        found, probability = self._identifier.classify(text)
        return None if found != language and probability >= self.settings.certainty else text
