"""Prompts as a block of rows: padded on the left, with the positions of the codes to come; and the prefill of a cache.

Shapes: R rows of a block, P prompt slots, N image codes, S = h * w codes of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from generation.drawing.ragged_cache import RaggedCache
from generation.rows.draw import prompt_row, row_positions
from generation.rows.row import COMMANDS_IN_ROW
from generation.transformer.cache import KVCache
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer


@dataclass(frozen=True)
class PaddedPrompts:
    """Prompts up to and with [BOI1]: `tokens` [R, P], `hidden` [R, P + S - 1], `positions` [R, P + S] or [R, P + S, 2].

    `hidden` is True where a cache holds padding. The padding is on the left, so that [BOI1] and every code have the
    same slot in all rows. Positions count from the row's own first token, as in training.
    """

    tokens: Tensor
    hidden: Tensor
    positions: Tensor

    @property
    def slots(self) -> int:
        """P: slots of the longest prompt that the model reads."""
        return self.tokens.shape[1]

    @property
    def code_positions(self) -> Tensor:
        """Positions [R, S] or [R, S, 2] of the codes."""
        return self.positions[:, self.slots :]

    def to(self, device: torch.device) -> PaddedPrompts:
        """The same with tokens and positions on another device; a cache takes `hidden` there itself."""
        return PaddedPrompts(self.tokens.to(device), self.hidden, self.positions.to(device))


def pad_prompts(config: TransformerConfig, prompts: Sequence[Sequence[int]], grid: tuple[int, int]) -> PaddedPrompts:
    """Rows of raw text pieces, for pictures of `grid` codes. Raises `ValueError` for pieces outside the vocabulary."""
    vocab, slots = config.vocabulary, config.max_text + COMMANDS_IN_ROW - 1
    steps = grid[0] * grid[1]
    tokens = torch.full((len(prompts), slots), vocab.command("[PAD]"))
    hidden = torch.zeros(len(prompts), slots + steps - 1, dtype=torch.bool)
    axes = () if config.position_kind == "sequence" else (2,)
    positions = torch.zeros(len(prompts), slots + steps, *axes, dtype=torch.int64)
    for i, text in enumerate(prompts):
        row = prompt_row(vocab, text, grid, config.max_text)
        padding = slots - len(row)
        tokens[i, padding:] = torch.tensor(row)
        hidden[i, :padding] = True
        num_text = len(row) + 1 - COMMANDS_IN_ROW
        positions[i, padding:] = row_positions(num_text, grid, config.max_text, config.position_kind)[:-1]
    return PaddedPrompts(tokens, hidden, positions)


def prefill(model: Transformer, prompts: PaddedPrompts, cache: KVCache, given: Tensor | None = None) -> Tensor:
    """Fill the cache with the prompts and the codes `given` [R, n] after them; float32 logits [R, N] of the next code.

    On a CPU every row goes by itself, equal ones once: its bits then do not depend on other rows, at no cost there.
    """
    tokens = prompts.tokens if given is None else torch.cat([prompts.tokens, given], dim=1)
    positions = prompts.positions[:, : tokens.shape[1]]
    if isinstance(cache, RaggedCache):
        hidden = model(cache.align(tokens), cache.align(positions), cache)
        rows = torch.arange(len(tokens), device=tokens.device)
        return model.logits(hidden[rows, tokens.shape[1] - 1 - cache.padding], image_only=True).float()
    if tokens.device.type != "cpu":
        return model.logits(model(tokens, positions, cache)[:, -1], image_only=True).float()
    logits: dict[tuple[int, ...], tuple[int, Tensor]] = {}  # of a row's tokens: the first such row, and what follows
    results = []
    for row, key in enumerate(map(tuple, tokens.tolist())):
        if key in logits:
            cache.copy_row(logits[key][0], row)
        else:
            hidden = model(tokens[row : row + 1], positions[row : row + 1], cache.row(row))
            logits[key] = row, model.logits(hidden[:, -1], image_only=True).float()
        results.append(logits[key][1])
    cache.advance(tokens.shape[1])
    return torch.cat(results)
