"""Texts with telephone numbers (phonenumbers), addresses of mail and internet, and Chinese identity numbers."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from data.options import option

# where a number without a country code is looked for, by the language of its text
REGIONS = {
    "zh": ("CN", "TW"), "en": ("US", "GB"), "fr": ("FR", "CA"), "de": ("DE", "AT"), "cs": ("CZ",), "ja": ("JP",),
    "ko": ("KR",),
}  # fmt: skip
_MAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_ADDRESS = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])")
# 17 digits and a check digit (GB 11643-1999, by ISO 7064 MOD 11-2), of which 7 to 14 are a date of birth
_IDENTITY = re.compile(r"(?<!\d)\d{6}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\w)")
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_CHECKS = "10X98765432"


@dataclass(frozen=True)
class PrivacySettings:
    """Texts with telephone numbers, mail addresses, internet addresses or Chinese identity numbers."""

    on: bool = option(True, "Drop texts that hold personal data.")


class PrivacyFilter:
    """Drops a text that holds personal data. Names and postal addresses are not looked for."""

    reason = "personal data"

    def __init__(self, settings: PrivacySettings) -> None:
        import phonenumbers

        self._matcher = phonenumbers.PhoneNumberMatcher

    def judge(self, text: str, language: str) -> str | None:
        """See `TextFilter`."""
        if _MAIL.search(text) or any(map(_is_address, _ADDRESS.findall(text))):
            return None
        if any(map(_is_identity, _IDENTITY.findall(text))):
            return None
        if sum(character.isdigit() for character in text) < 7:  # no telephone number is shorter
            return text
        regions = REGIONS.get(language, ("US",))
        return None if any(self._matcher(text, region).has_next() for region in regions) else text


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_identity(number: str) -> bool:
    total = sum(int(digit) * weight for digit, weight in zip(number, _WEIGHTS, strict=False))
    return _CHECKS[total % 11] == number[-1].upper()
