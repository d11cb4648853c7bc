"""Rows that draw: `[ROI1] text [SIZE] [BOI1] codes [EOI1]`.

The order is CogView's (Ding et al. 2021, arXiv:2105.13290, section 2.1). Shapes: T tokens in a row, h x w codes in a picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from generation.rows.row import COMMANDS_IN_ROW, PositionKind, Row
from generation.rows.vocabulary import Vocabulary


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
