"""Prompts as a block of rows: padded on the left, with the positions of the codes to come; and the prefill of a cache.

Shapes: R rows of a block, P prompt slots, N image codes, S places of a picture: its codes, perhaps with ends of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from generation.drawing.ragged_cache import RaggedCache
from generation.rows.draw import prompt_row, row_positions
from generation.rows.fill import kept_levels
from generation.rows.prompt import Prompt
from generation.rows.row import COMMANDS_IN_ROW
from generation.transformer.cache import KVCache
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from generation.transformer.prompt_features import PrefixMap


@dataclass(frozen=True)
class PaddedPrompts:
    """Prompts up to and with [BOI1]: `tokens` [R, P], `hidden` [R, P + S - 1], `positions` [R, P + S] or [R, P + S, 2].

    In a model's own frame, another mark stands for [BOI1]. `hidden` is True where a cache holds padding. The padding is
    on the left, so that [BOI1] and every code have the same slot in all rows. Positions count from the row's own first
    token, as in training. `features` are the vectors [n, C] of each row's prompt, of another n in each where vectors
    are the prompt; None where no row has any.
    """

    tokens: Tensor
    hidden: Tensor
    positions: Tensor
    features: tuple[Tensor, ...] | None = None
    ends_with_vector: bool = False  # whether the last token of a row with vectors is one of them

    @property
    def vectors(self) -> Tensor | None:
        """Those of all rows, one row after another, as `Transformer.forward` takes them."""
        return None if self.features is None else torch.cat(self.features)

    def split_vectors(self) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
        """`vectors` without those of the last tokens of the rows; and these, [0 or 1, C] of each row."""
        if self.features is None:
            return None, None
        ends = [int(self.ends_with_vector and len(one) > 0) for one in self.features]
        parts = [one.split([len(one) - end, end]) for one, end in zip(self.features, ends, strict=True)]
        return torch.cat([first for first, _ in parts]), tuple(last for _, last in parts)

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
        features = None if self.features is None else tuple(one.to(device) for one in self.features)
        return replace(self, tokens=self.tokens.to(device), positions=self.positions.to(device), features=features)

    def row(self, number: int) -> PaddedPrompts:
        """One row alone."""
        one = slice(number, number + 1)
        features = None if self.features is None else self.features[one]
        return replace(
            self, tokens=self.tokens[one], hidden=self.hidden[one], positions=self.positions[one], features=features
        )


def pad_prompts(
    config: TransformerConfig, prompts: Sequence[Sequence[int]], grid: tuple[int, int], *, tight: bool = False
) -> PaddedPrompts:
    """Rows of raw text pieces, for pictures of `grid` codes; a `Prompt` among them brings its features.

    They are padded to the longest prompt that the model reads or, if `tight`, to the longest of these.
    Raises `ValueError` for pieces outside the vocabulary, and for features that the model does not read.
    """
    vocab, slots = config.vocabulary, config.max_text + COMMANDS_IN_ROW - 1
    rows = [_begin(config, text, grid) for text in prompts]
    if tight:
        slots = max(map(len, rows))
    steps = config.places(grid)
    tokens = torch.full((len(prompts), slots), vocab.command("[PAD]"))
    hidden = torch.zeros(len(prompts), slots + steps - 1, dtype=torch.bool)
    axes = () if config.position_kind == "sequence" else (2,)
    positions = torch.zeros(len(prompts), slots + steps, *axes, dtype=torch.int64)
    for i, row in enumerate(rows):
        padding = slots - len(row)
        tokens[i, padding:] = torch.tensor(row)
        hidden[i, :padding] = True
        if config.row_end >= 0:
            positions[i, padding:] = torch.arange(len(row) + steps)
            continue
        num_text = len(row) + 1 - COMMANDS_IN_ROW
        positions[i, padding:] = row_positions(num_text, grid, config.max_text, config.position_kind)[:-1]
    return PaddedPrompts(tokens, hidden, positions, _features(config, prompts), config.prefix_width > 0)


def _begin(config: TransformerConfig, text: Sequence[int], grid: tuple[int, int]) -> list[int]:
    if config.frame.own:
        row = config.frame.row(config.vocabulary, text, config.max_text)
        if config.prefix_width and isinstance(text, Prompt) and text.features is not None:
            row = [config.vocabulary.command(PrefixMap.mark)] * len(row)
        return row
    return prompt_row(config.vocabulary, text, grid, config.max_text)


def _features(config: TransformerConfig, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, ...] | None:
    """Float32 [n, C] of each prompt; None where none has any. One without has a vector of zeros, or none at all."""
    given = [(prompt, prompt.features if isinstance(prompt, Prompt) else None) for prompt in prompts]
    width = config.prefix_width or config.prompt_features.width
    for prompt, one in given:
        shape = (len(prompt) if config.prefix_width else 1, width)
        if one is not None and (not width or one.shape != shape):
            wanted = f"vectors {list(shape)}" if width else "no vectors"
            raise ValueError(f"this model reads {wanted} in its prompts, not {list(one.shape)}")
    if all(one is None for _, one in given):
        return None
    nothing = torch.zeros(0 if config.prefix_width else 1, width)
    return tuple(nothing if one is None else one.float() for _, one in given)


def prefill(model: Transformer, prompts: PaddedPrompts, cache: KVCache, given: Tensor | None = None) -> Tensor:
    """Fill the cache with the prompts and the codes `given` [R, n] after them; float32 logits [R, N] of the next code.

    On a CPU every row goes by itself, equal ones once: its bits then do not depend on other rows, at no cost there.
    """
    tokens = prompts.tokens if given is None else torch.cat([prompts.tokens, given], dim=1)
    positions = prompts.positions[:, : tokens.shape[1]]
    if isinstance(cache, RaggedCache):
        hidden = model(cache.align(tokens), cache.align(positions), cache, features=prompts.vectors)
        rows = torch.arange(len(tokens), device=tokens.device)
        return model.logits(hidden[rows, tokens.shape[1] - 1 - cache.padding], image_only=True).float()
    return _read(model, _Reading(prompts, tokens, positions, [-1]), cache)[:, 0]


def prefill_around_holes(
    model: Transformer, prompts: PaddedPrompts, cache: KVCache, given: Tensor, hidden: Tensor
) -> dict[int, Tensor]:
    """Fill the cache with the prompts and those codes of `given` [R, S] that are not `hidden` (bool [S]).

    Returns the float32 logits [R, N] of each hole that comes right after the prompt or after a kept code; the others
    are predicted by the hole before them (`generation.rows.fill`). Rows go by themselves as in `prefill`.
    """
    slots, kept = prompts.slots, (~hidden).nonzero()[:, 0]
    codes = prompts.positions[:, slots:]
    tokens = torch.cat([prompts.tokens, given[:, kept]], dim=1)
    positions = torch.cat([prompts.positions[:, :slots], codes[:, kept]], dim=1)
    levels = kept_levels(slots, hidden)[torch.cat([torch.arange(slots, device=kept.device), slots + kept])]
    place_of = {-1: slots - 1, **{place: slots + k for k, place in enumerate(kept.tolist())}}
    firsts = [place for place in hidden.nonzero()[:, 0].tolist() if place - 1 in place_of]
    reading = _Reading(prompts, tokens, positions, [place_of[place - 1] for place in firsts], levels)
    logits = _read(model, reading, cache)
    return {place: logits[:, k] for k, place in enumerate(firsts)}


@dataclass(frozen=True)
class _Reading:
    """What a prefill reads, `tokens` [R, T] at `positions`, and after which of them (places `at`) logits are wanted."""

    prompts: PaddedPrompts
    tokens: Tensor
    positions: Tensor
    at: list[int]
    levels: Tensor | None = None  # [T], the same in all rows


def _read(model: Transformer, reading: _Reading, cache: KVCache) -> Tensor:
    """Fill the cache; float32 logits [R, F, N] after the F places that are wanted."""
    tokens, positions, prompts = reading.tokens, reading.positions, reading.prompts
    levels = None if reading.levels is None else reading.levels[None]
    if tokens.device.type != "cpu":
        levels = None if levels is None else levels.expand_as(tokens)
        hidden = model(tokens, positions, cache, features=prompts.vectors, levels=levels)
        return model.logits(hidden[:, reading.at], image_only=True).float()
    logits: dict[object, tuple[int, Tensor]] = {}  # of a row's tokens and features: the first such row, what follows
    results = []
    for row, read in enumerate(map(tuple, tokens.tolist())):
        features = prompts.row(row).vectors
        key = (read, None if features is None else tuple(features.flatten().tolist()))
        if key in logits:
            cache.copy_row(logits[key][0], row)
        else:
            here, part = slice(row, row + 1), cache.row(row)
            hidden = model(tokens[here], positions[here], part, features=features, levels=levels)
            logits[key] = row, model.logits(hidden[:, reading.at], image_only=True).float()
        results.append(logits[key][1])
    cache.advance(tokens.shape[1])
    return torch.cat(results)
