"""How towers of Hugging Face's transformers are read. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from data.options import check_options, option


@dataclass
class TransformersImport:
    """What of a folder's own settings is overruled."""

    max_tokens: int | None = option(
        None, "Cut texts to this many tokens; by default as many as the towers were trained on.", least=2, most=8192
    )
    prefix: str = option("", "Put this before each text.")

    def __post_init__(self) -> None:
        check_options(self)
