"""What the import of Janus may be told; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data.options import check_options, option

TemplateName = Literal["auto", "pro", "first"]


@dataclass(frozen=True, kw_only=True)
class JanusImport:
    """Choices that the published files leave open."""

    name: str | None = option(None, "Name the model; by default like its folder.")
    template: TemplateName = option(
        "auto",
        "Put prompts into this chat template: pro of Janus-Pro, first of Janus-1.3B; auto tells by the folder's name "
        "and the marks of the text tokenizer.",
    )
    max_text: int = option(
        256, "The longest prompt that is drawn, in pieces with the template; longer ones are refused.",
        least=16, most=2**14,
    )  # fmt: skip
    together: int = option(
        1, "Draw this many pictures side by side: more in an hour where computing is not the limit, for more memory.",
        least=1, most=8,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)
        if self.template not in ("auto", "pro", "first"):
            raise ValueError(f"template must be auto, pro or first, not {self.template!r}")
