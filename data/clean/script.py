"""Chinese texts into one script, by OpenCC."""

from __future__ import annotations

from dataclasses import dataclass

from data.options import option
from data.sample import DataError

CONVERSIONS = ("t2s", "s2t", "tw2sp", "hk2s")


@dataclass(frozen=True)
class ScriptSettings:
    """Chinese texts into one script."""

    on: bool = option(True, "Convert texts tagged zh.")
    conversion: str = option("t2s", "OpenCC's conversion: t2s (traditional to simplified), s2t, tw2sp or hk2s.")

    def __post_init__(self) -> None:
        if self.conversion not in CONVERSIONS:
            raise DataError(f"the conversion is one of {', '.join(CONVERSIONS)}, not {self.conversion!r}")


class ScriptFilter:
    """Converts texts tagged `zh`; drops none."""

    reason = "script"

    def __init__(self, settings: ScriptSettings) -> None:
        import opencc

        self._converter = opencc.OpenCC(settings.conversion)

    def judge(self, text: str, language: str) -> str | None:
        """See `TextFilter`."""
        converted: str = self._converter.convert(text) if language == "zh" else text
        return converted
