"""What the import of LlamaGen may be told; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from data.options import DEPTH, SIDE, check_options, option


@dataclass(frozen=True, kw_only=True)
class LlamaGenImport:
    """Choices that the published files leave open."""

    name: str | None = option(None, "Name the model; by default like its file.")
    image_size: int | None = option(
        None, "The model draws pictures of this many pixels a side; by default the 256, 384 or 512 in the file's name.",
        least=2, most=SIDE,
    )  # fmt: skip
    heads: int | None = option(
        None, "Use this many heads; by default those of the published models of this width.", least=1, most=DEPTH
    )
    layers: int | None = option(
        None, "Refuse weights with another number of layers; by default that of the published models of this width.",
        least=1, most=DEPTH,
    )  # fmt: skip
    together: int = option(
        1, "Draw this many pictures side by side: more in an hour where computing is not the limit, for more memory.",
        least=1, most=8,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)
