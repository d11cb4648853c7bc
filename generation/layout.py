"""One vocabulary, and how a caption and a picture become a row of it.

`[ROI1] text [SIZE] [BOI1] codes [EOI1]`, as CogView's (Ding et al. 2021, arXiv:2105.13290, section 2.1), to draw;
`[SIZE] [BOI1] codes [EOI1] [ROI1] text [SEP]` to describe. One model can learn both, each from its own rows, as
ERNIE-ViLG does (Zhang et al. 2021, arXiv:2112.15283, section 3.1).
Shapes: B rows in a batch, T tokens in a row, h x w codes in a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

PositionKind = Literal["sequence", "grid"]

COMMANDS = (
    *("[PAD]", "[BOI1]", "[BOI2]", "[BOI3]", "[EOI1]", "[EOI2]", "[EOI3]", "[ROI1]", "[ROI2]", "[ROI3]"),
    *("[SEP]", "[MASK]", "[CLS]", "[ENC]", "[TINY]", "[SMALL]", "[BASE]", "[BIG]"),
    *(f"[POS{i}]" for i in range(9)),
)
SIZES = {"[TINY]": 8, "[SMALL]": 16, "[BASE]": 32, "[BIG]": 64}  # codes along the longer side
COMMANDS_IN_ROW = 4  # [ROI1] [SIZE] [BOI1] [EOI1]


@dataclass(frozen=True)
class Vocabulary:
    """Image codes 0..N-1, text pieces N..N+T-1, then the 27 commands; rounded up to a multiple of 128.

    The prompt vectors of an adapter (`generation/transformer/adapters.py`) come after that. As raw text pieces they are T, T+1, ...
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
        """The prompt vectors as raw text pieces, to be put before those of a text."""
        return list(range(self.num_text_pieces, self.num_text_pieces + self.num_prompt_vectors))

    @property
    def size(self) -> int:
        """Ids with a meaning."""
        return self.num_image_codes + self.num_text_pieces + len(COMMANDS)

    @property
    def padded_size(self) -> int:
        """Rows of the embedding."""
        return -(-self.size // 128) * 128

    def command(self, name: str) -> int:
        """The id of a command such as `[BOI1]`; `ValueError` for any other word."""
        if name not in COMMANDS:
            raise ValueError(f"{name!r} is not a command; the commands are {' '.join(COMMANDS)}")
        return self.text_range.stop + COMMANDS.index(name)

    def size_command(self, grid: tuple[int, int]) -> int:
        """The id of the smallest named size that holds `grid` (h, w); `ValueError` if [BIG] does not."""
        for name, side in SIZES.items():
            if 0 < min(grid) and max(grid) <= side:
                return self.command(name)
        raise ValueError(f"a grid of {grid[0]}x{grid[1]} codes has no size command: use 1x1 to 64x64")

    def text(self, ids: Iterable[int]) -> list[int]:
        """Raw text pieces (0..T-1, and the prompt vectors) as ids of this vocabulary; `ValueError` for one outside."""
        pieces, end = list(ids), self.num_text_pieces + self.num_prompt_vectors
        if pieces and not (0 <= min(pieces) and max(pieces) < end):
            raise ValueError(f"text pieces must lie in 0..{end - 1}: is this the right tokenizer?")
        beyond = self.padded_size - self.num_text_pieces
        return [piece + (self.num_image_codes if piece < self.num_text_pieces else beyond) for piece in pieces]


@dataclass(frozen=True)
class Row:
    """One training row, inputs and targets already shifted against each other.

    `tokens` [T], `targets` [T] (the token after each, [PAD] where nothing is to be learned), `positions` [T] or
    [T, 2], `image_mask` [T] (the target is an image code). A row that describes has `segments` [T]: 0 at the picture,
    k at its k-th text. A text sees the picture and itself; without segments, a token sees all before it.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    image_mask: Tensor
    segments: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Rows with [PAD] at the end: `tokens`, `targets`, `image_mask`, `weights` [B, T], `positions` [B, T] or [B, T, 2].

    `weights` (float32) is 1 where the target is an image code, the text weight at text and commands, 0 at [PAD].
    `segments` [B, T] is there if the rows describe, see `Row`. `lengths` is there if the rows are packed (`pack`).
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    image_mask: Tensor
    weights: Tensor
    segments: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.image_mask.to(device, non_blocking=True),
            self.weights.to(device, non_blocking=True),
            None if self.segments is None else self.segments.to(device, non_blocking=True),
            self.lengths,
        )


def row_positions(num_text: int, grid: tuple[int, int], max_text: int, kind: PositionKind) -> Tensor:
    """Positions of a whole row with `num_text` text pieces: [T] ("sequence") or [T, 2] ("grid"), T = num_text+h*w+4.

    "sequence" counts 0, 1, 2, ... as CogView does. "grid" puts text and commands on the diagonal, (t, t), and code
    (r, c) at (M + r, M + c) with M = max_text + 4, beyond any text: a picture's positions do not depend on how long
    its caption is, so they can be learned. [EOI1] follows the last code, at (M + h, M + w).
    """
    height, width = grid
    before = num_text + COMMANDS_IN_ROW - 1  # everything up to and with [BOI1]
    if kind == "sequence":
        return torch.arange(before + height * width + 1)
    origin = max_text + COMMANDS_IN_ROW
    diagonal = torch.arange(before).unsqueeze(1).expand(before, 2)
    cells = origin + torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2)
    end = torch.tensor([[origin + height, origin + width]])
    return torch.cat([diagonal, cells, end])


def prompt_row(vocab: Vocabulary, text_ids: Sequence[int], grid: tuple[int, int], max_text: int) -> list[int]:
    """`[ROI1] text [SIZE] [BOI1]`: what is given before the codes. Text beyond `max_text` pieces is cut.

    `text_ids` are raw text pieces; none at all is the unconditional prompt of classifier-free guidance.
    """
    start = [vocab.command("[ROI1]"), *vocab.text(text_ids[:max_text])]
    return [*start, vocab.size_command(grid), vocab.command("[BOI1]")]


def training_row(
    vocab: Vocabulary, text_ids: Sequence[int], codes: Tensor, max_text: int, kind: PositionKind = "grid"
) -> Row:
    """The row of raw text pieces and `codes` [h, w] (raster order). Text beyond `max_text` pieces is cut."""
    if codes.ndim != 2:
        raise ValueError(f"codes must be [h, w], not {list(codes.shape)}")
    grid = (codes.shape[0], codes.shape[1])
    prompt = prompt_row(vocab, text_ids, grid, max_text)
    codes = codes.reshape(-1).to(torch.int64)
    row = torch.cat([torch.tensor(prompt), codes, torch.tensor([vocab.command("[EOI1]")])])
    positions = row_positions(len(prompt) + 1 - COMMANDS_IN_ROW, grid, max_text, kind)
    targets = row[1:]
    return Row(row[:-1], positions[:-1], targets, targets < vocab.num_image_codes)


def caption_prompt_row(vocab: Vocabulary, codes: Tensor, text_ids: Sequence[int] = ()) -> list[int]:
    """`[SIZE] [BOI1] codes [EOI1] [ROI1] text`: a picture [h, w] and the raw text pieces its caption begins with."""
    grid = (codes.shape[0], codes.shape[1])
    start = [vocab.size_command(grid), vocab.command("[BOI1]"), *codes.reshape(-1).tolist()]
    return [*start, vocab.command("[EOI1]"), vocab.command("[ROI1]"), *vocab.text(text_ids)]


def caption_row_positions(num_text: int, grid: tuple[int, int], max_text: int, kind: PositionKind) -> Tensor:
    """Positions of `[SIZE] [BOI1] codes [EOI1] [ROI1] text [SEP]`: [T] ("sequence") or [T, 2] ("grid").

    In a "grid", text and codes stand where they stand in a row that draws; only the order of the two differs. [SIZE]
    and [BOI1] come right before the origin of the codes: anywhere that depends on the text would tell its length.
    """
    height, width = grid
    if kind == "sequence":
        return torch.arange(num_text + height * width + COMMANDS_IN_ROW + 1)
    image = row_positions(max_text, grid, max_text, kind)[max_text + 1 :]  # [SIZE] [BOI1] codes [EOI1]
    text = torch.arange(num_text + 2).unsqueeze(1).expand(-1, 2)  # [ROI1] text [SEP]
    return torch.cat([image, text])


def caption_row(
    vocab: Vocabulary,
    texts: Sequence[Sequence[int]],
    codes: Tensor,
    max_text: int,
    kind: PositionKind = "grid",
    given: Tensor | None = None,
) -> Row:
    """The training row in which each of `texts` (raw pieces, cut after `max_text` of them) describes `codes` [h, w].

    No text sees another (`Row.segments`), so the row stands for one row a text, for the price of one picture. Only
    text is learned. `given`, bool [h, w], leaves codes out: cheaper, and hardly worse to learn from than the whole
    picture, as in FLIP (Li et al. 2022, arXiv:2212.00794).
    """
    if codes.ndim != 2:
        raise ValueError(f"codes must be [h, w], not {list(codes.shape)}")
    grid = (codes.shape[0], codes.shape[1])
    picture = torch.tensor(caption_prompt_row(vocab, codes)[:-1])
    kept = torch.ones_like(picture, dtype=torch.bool)
    if given is not None:
        kept[2:-1] = given.reshape(-1)  # [SIZE] and [BOI1] stand before the codes, [EOI1] behind them
    tokens, positions = [picture[kept]], [caption_row_positions(0, grid, max_text, kind)[: len(picture)][kept]]
    targets, segments = [torch.full_like(tokens[0], vocab.command("[PAD]"))], [torch.zeros_like(tokens[0])]
    for number, text in enumerate(texts, start=1):
        whole = torch.tensor([vocab.command("[ROI1]"), *vocab.text(text[:max_text]), vocab.command("[SEP]")])
        tokens.append(whole[:-1])
        targets.append(whole[1:])
        positions.append(caption_row_positions(len(whole) - 2, grid, max_text, kind)[len(picture) : -1])
        segments.append(torch.full_like(tokens[-1], number))
    row = torch.cat(tokens)
    no_codes = torch.zeros_like(row, dtype=torch.bool)
    return Row(row, torch.cat(positions), torch.cat(targets), no_codes, torch.cat(segments))


def noisy_codes(codes: Tensor, other: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """`codes` with that share of them taken from the same places of `other`: both of any, the same, shape."""
    return torch.where(torch.rand(codes.shape, generator=generator) < share, other.to(codes.dtype), codes)


def with_noise(row: Row, other: Tensor, share: float, generator: torch.Generator) -> Row:
    """A `row` that draws, with that share of the codes it is given, not of its targets, taken from `other` [h, w].

    `other` is another picture, or [MASK] all over.
    A model that cannot trust every code before looks more at the text and survives its own slips when it draws: the
    aim of scheduled sampling (Bengio et al. 2015, arXiv:1506.03099), for the price of a lookup.
    """
    places = row.image_mask.roll(1).nonzero()[:, 0]  # the target of the last place is no code
    tokens = row.tokens.clone()
    tokens[places] = noisy_codes(tokens[places], other.reshape(-1)[: len(places)], share, generator)
    return replace(row, tokens=tokens)


def collate(vocab: Vocabulary, rows: Sequence[Row], text_weight: float = 1.0) -> Batch:
    """Stack `rows`, padded at the end with [PAD] to the longest of them. All of them draw, or all describe."""
    if not rows:
        raise ValueError("a batch needs at least one row")
    size, length, padding = len(rows), max(len(row.tokens) for row in rows), vocab.command("[PAD]")
    tokens = torch.full((size, length), padding)
    targets = tokens.clone()
    positions = torch.zeros(size, length, *rows[0].positions.shape[1:], dtype=torch.int64)
    image_mask = torch.zeros(size, length, dtype=torch.bool)
    segments = None if rows[0].segments is None else torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        end = len(row.tokens)
        tokens[i, :end] = row.tokens
        targets[i, :end] = row.targets
        positions[i, :end] = row.positions
        image_mask[i, :end] = row.image_mask
        assert (row.segments is None) == (segments is None)
        if segments is not None and row.segments is not None:
            segments[i, :end] = row.segments
    weights = torch.where(image_mask, 1.0, text_weight).masked_fill(targets == padding, 0.0)
    return Batch(tokens, positions, targets, image_mask, weights, segments)


def pack(vocab: Vocabulary, rows: Sequence[Row], text_weight: float = 1.0) -> Batch:
    """`rows` behind one another in one row without padding, B = 1; `Batch.lengths` are theirs. None sees another."""
    if not rows:
        raise ValueError("a batch needs at least one row")
    assert len({row.segments is None for row in rows}) == 1
    segments = [row.segments for row in rows if row.segments is not None]
    whole = Row(
        torch.cat([row.tokens for row in rows]),
        torch.cat([row.positions for row in rows]),
        torch.cat([row.targets for row in rows]),
        torch.cat([row.image_mask for row in rows]),
        torch.cat(segments) if segments else None,
    )
    return replace(collate(vocab, [whole], text_weight), lengths=tuple(len(row.tokens) for row in rows))
