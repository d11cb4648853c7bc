"""The prompt of a model that was trained elsewhere with rows of its own, such as Janus.

`[begin] text [end]` and then the codes. The text holds the model's chat template already, since its pieces are those of
template and prompt together (`data.framed_text`). The row without the prompt, as guidance needs, is as long: `[blank]`
stands for every piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data.options import check_options, option
from generation.rows.vocabulary import Vocabulary

MARKS_IN_FRAME = 2  # [begin] [end]


@dataclass
class PromptFrame:
    """Which marks a prompt stands between: "commands" are ours (`rows.draw.prompt_row`), "marks" a model's own.

    The marks are raw text pieces.
    """

    kind: Literal["commands", "marks"] = "commands"
    begin: int = option(0, "The piece that a row begins with.", least=0, most=2**22)
    end: int = option(0, "The piece before the codes.", least=0, most=2**22)
    blank: int = option(0, "The piece that stands for each of the text where there is no prompt.", least=0, most=2**22)

    def __post_init__(self) -> None:
        check_options(self)
        if self.kind not in ("commands", "marks"):
            raise ValueError(f"frame.kind must be commands or marks, not {self.kind!r}")

    @property
    def own(self) -> bool:
        """Whether the marks are the model's own."""
        return self.kind == "marks"

    def row(self, vocab: Vocabulary, text_ids: Sequence[int], max_text: int) -> list[int]:
        """`[begin] text [end]`, the tokens before the codes.

        Raises `ValueError` for more than `max_text` pieces: cut, the template would have no end.
        """
        assert self.own
        if len(text_ids) > max_text:
            raise ValueError(f"a prompt of {len(text_ids)} pieces, and this model reads {max_text}: shorten it")
        return vocab.text([self.begin, *text_ids, self.end])

    def unprompted(self, text_ids: Sequence[int]) -> list[int]:
        """The raw text pieces of the row without the prompt that goes with a prompt."""
        return [self.blank] * len(text_ids) if self.own else []
