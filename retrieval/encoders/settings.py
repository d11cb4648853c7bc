"""How a published text encoder is read. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from data.config import ConfigError
from data.options import check_options, option


@dataclass
class TextImport:
    """How an encoder turns tokens into a vector, where its own files do not say so."""

    pooling: str = option("", "mean or first (token); default: what the folder says, else mean.")
    prefix: str | None = option(None, "Put this before each text; default: 'query: ' for E5, else nothing.")
    max_tokens: int = option(64, "Cut texts to this many tokens.", least=2, most=8192)
    bits: int = option(16, "Store numbers in 32, 16 or 4 bits.", least=4, most=32)

    def __post_init__(self) -> None:
        check_options(self)
        if self.pooling not in ("", "mean", "first"):
            raise ConfigError(f"the pooling of a text encoder is mean or first, not {self.pooling!r}")
        if self.bits not in (4, 16, 32):
            raise ConfigError(f"numbers are stored in 4, 16 or 32 bits, not {self.bits}")
