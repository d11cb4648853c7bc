"""The prompt of a model that was trained elsewhere with rows of its own, such as Janus, LlamaGen and Emu3.

"marks": `[begin] text [end]` and then the codes; "bare": the text alone, which then holds such marks itself. The text
holds the model's chat template already, since its pieces are those of template and prompt together
(`data.framed_text`). What the row without the prompt holds, as guidance needs it, differs:

* "blank": one piece, for every piece of the text (Janus; LlamaGen's class of no class);
* "slots": the text pieces themselves, without the vectors that stand there otherwise (LlamaGen's captions);
* "stored": pieces that the model's makers chose, such as those of a text that nobody wants to see (Emu3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from data.options import check_options, option
from generation.rows.vocabulary import Vocabulary

MARKS_IN_FRAME = 2  # [begin] [end]
Kind = Literal["commands", "marks", "bare"]
Unprompted = Literal["blank", "slots", "stored"]


@dataclass
class PromptFrame:
    """What a prompt stands between: "commands" are ours (`rows.draw.prompt_row`), the others a model's own.

    The marks are raw text pieces.
    """

    kind: Kind = "commands"
    begin: int = option(0, "The piece that a row begins with.", least=0, most=2**22)
    end: int = option(0, "The piece before the codes.", least=0, most=2**22)
    blank: int = option(0, "The piece that stands for each of the text where there is no prompt.", least=0, most=2**22)
    without: Unprompted = "blank"  # which text pieces the row without the prompt has
    stored: list[int] = option([], "Those pieces, of the kind stored.", least=0, most=2**22)

    def __post_init__(self) -> None:
        check_options(self)
        if self.kind not in get_args(Kind) or self.without not in get_args(Unprompted):
            raise ValueError(f"unknown frame {self.kind!r} without {self.without!r}")

    @property
    def own(self) -> bool:
        """Whether the rows are the model's own."""
        return self.kind != "commands"

    @property
    def highest(self) -> int:
        """The highest raw text piece that the frame names."""
        return max(self.begin, self.end, self.blank, *self.stored)

    def row(self, vocab: Vocabulary, text_ids: Sequence[int], max_text: int) -> list[int]:
        """`[begin] text [end]`, or the text alone: the tokens before the codes.

        Raises `ValueError` for more than `max_text` pieces: cut, the template would have no end.
        """
        assert self.own
        if len(text_ids) > max_text:
            raise ValueError(f"a prompt of {len(text_ids)} pieces, and this model reads {max_text}: shorten it")
        if self.kind == "bare":
            return vocab.text(text_ids)
        return vocab.text([self.begin, *text_ids, self.end])

    def unprompted(self, text_ids: Sequence[int]) -> list[int]:
        """The raw text pieces of the row without the prompt that goes with a prompt."""
        if not self.own:
            return []
        if self.without == "blank":
            return [self.blank] * len(text_ids)
        return list(text_ids) if self.without == "slots" else list(self.stored)
