"""What the import of Emu3-Gen may be told; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from data.options import SIDE, check_options, option

# what the published script adds to every prompt, and what it guides away from
PRAISE = " masterpiece, film grained, best quality."
UNWANTED = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)


@dataclass(frozen=True, kw_only=True)
class Emu3Import:
    """Choices that the published files leave open."""

    name: str | None = option(None, "Name the model; by default like its folder.")
    image_size: int = option(
        720, "The model draws pictures of this many pixels a side: 720 for Emu3-Gen, 512 for Emu3-Stage1.",
        least=8, most=SIDE,
    )  # fmt: skip
    praise: str = option(PRAISE, "Put these words behind every prompt.")
    unwanted: str = option(UNWANTED, "Guide away from this text.")
    max_text: int = option(
        256, "The longest prompt that is drawn, in pieces with what is put around it; longer ones are refused.",
        least=16, most=2**14,
    )  # fmt: skip
    together: int = option(
        1, "Draw this many pictures side by side: more in an hour where computing is not the limit, for more memory.",
        least=1, most=8,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)
