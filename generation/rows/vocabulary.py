"""One vocabulary for image codes, text pieces and commands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

COMMANDS = (
    *("[PAD]", "[BOI1]", "[BOI2]", "[BOI3]", "[EOI1]", "[EOI2]", "[EOI3]", "[ROI1]", "[ROI2]", "[ROI3]"),
    *("[SEP]", "[MASK]", "[CLS]", "[ENC]", "[TINY]", "[SMALL]", "[BASE]", "[BIG]"),
    *(f"[POS{i}]" for i in range(9)),
)
SIZES = {"[TINY]": 8, "[SMALL]": 16, "[BASE]": 32, "[BIG]": 64}  # codes along the longer side


@dataclass(frozen=True)
class Vocabulary:
    """N image codes, T text pieces and 27 commands, in that order; the size is rounded up to a multiple of 128.

    Image codes have the ids 0..N-1 and text pieces N..N+T-1. The prompt vectors of an adapter
    (`generation.transformer.adapters`) come after the rounded size; as raw text pieces they are T, T+1, ...
    """

    num_image_codes: int
    num_text_pieces: int
    num_prompt_vectors: int = 0

    @property
    def image_range(self) -> range:
        """Ids of the image codes."""
        return range(self.num_image_codes)

    @property
    def text_range(self) -> range:
        """Ids of the text pieces."""
        return range(self.num_image_codes, self.num_image_codes + self.num_text_pieces)

    @property
    def command_range(self) -> range:
        """Ids of the commands."""
        return range(self.text_range.stop, self.size)

    @property
    def prompt_pieces(self) -> list[int]:
        """The prompt vectors as raw text pieces, which go before those of a text."""
        return list(range(self.num_text_pieces, self.num_text_pieces + self.num_prompt_vectors))

    @property
    def size(self) -> int:
        """The number of ids that are in use."""
        return self.num_image_codes + self.num_text_pieces + len(COMMANDS)

    @property
    def padded_size(self) -> int:
        """The number of rows of the embedding: `size` rounded up to a multiple of 128."""
        return -(-self.size // 128) * 128

    def command(self, name: str) -> int:
        """The id of a command such as `[BOI1]`. Raises `ValueError` for any other word."""
        if name not in COMMANDS:
            raise ValueError(f"{name!r} is not a command; the commands are {' '.join(COMMANDS)}")
        return self.text_range.stop + COMMANDS.index(name)

    def size_command(self, grid: tuple[int, int]) -> int:
        """The id of the smallest named size that holds `grid` (h, w). Raises `ValueError` if none does."""
        for name, side in SIZES.items():
            if 0 < min(grid) and max(grid) <= side:
                return self.command(name)
        raise ValueError(f"a grid of {grid[0]}x{grid[1]} codes has no size command: use 1x1 to 64x64")

    def text(self, ids: Iterable[int]) -> list[int]:
        """Raw text pieces (0..T-1, and prompt vectors) as ids of this vocabulary. Raises `ValueError` for any other."""
        pieces, end = list(ids), self.num_text_pieces + self.num_prompt_vectors
        if pieces and not (0 <= min(pieces) and max(pieces) < end):
            raise ValueError(f"text pieces must lie in 0..{end - 1}: is this the right tokenizer?")
        beyond = self.padded_size - self.num_text_pieces
        return [piece + (self.num_image_codes if piece < self.num_text_pieces else beyond) for piece in pieces]
