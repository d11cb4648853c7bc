"""Batches of rows: random ones to learn from, and fixed ones of held-out pictures.

Shapes: P pictures, h x w codes in a picture.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.sample import DataError
from generation.rows.base import Chance, RowKind, RowRecipe, TextEncoder
from generation.rows.mixture import ROW_KINDS, Mixture
from generation.rows.row import Row, RowBatch, collate, pack
from generation.training.config import GeneratorTrainConfig
from generation.training.pairs import CodedPairs
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from vqvae.training.process import rank, world_size

HELD_OUT_BATCH = 32  # rows

logger = logging.getLogger(__name__)


@dataclass
class RowMaker:
    """What turns pictures into rows: the text tokenizer, the sizes of the model, and the training's settings."""

    text: TextEncoder
    model: TransformerConfig
    config: GeneratorTrainConfig

    def kind(self, name: str) -> RowKind:
        """The rows of a kind, in the format of this model."""
        return ROW_KINDS[name](self.model)

    @property
    def recipe(self) -> RowRecipe:
        """How training rows are made."""
        config = self.config
        return RowRecipe(self.text, config.captions, config.code_noise, config.code_mask)

    def batch(self, rows: Sequence[Row]) -> RowBatch:
        """One batch of `rows`: packed where the settings say so and attention is dense, otherwise padded."""
        together = pack if self.config.packing and not self.model.sparse_window else collate
        return together(self.model.vocabulary, rows, self.config.text_weight)


class RowBatches:
    """Random training batches; (seed, step) decides the draw, whatever the number of processes."""

    def __init__(self, pairs: CodedPairs, maker: RowMaker) -> None:
        """Raises `DataError` for a kind of rows without a picture."""
        self.pairs, self.maker = pairs, maker
        self.weights = {name: self._weights(name) for name in Mixture(maker.config.mix).shares}

    def __call__(self, step: int) -> Iterator[tuple[tuple[RowBatch, Tensor], list[str]]]:
        """This process's micro-batches of a step, each with the divisor of its loss and the ids of its samples."""
        config = self.maker.config
        seed = config.loop.seed * 1_000_003 + step
        # A step has rows of one kind only: they are of similar length, and rows that draw need no mask but the causal
        choice = random.Random(f"{seed}")
        name = Mixture(config.mix).pick(choice.random())
        given = choice.uniform(config.given_codes, 1.0)
        generator = torch.Generator().manual_seed(seed)
        weights, size = self.weights[name], config.loop.batch_size
        drawn = torch.multinomial(weights, size, replacement=True, generator=generator).tolist()
        batches, ids = [], []
        # Each place in the batch has a random stream of its own, so that any number of processes draws the same rows
        for part in self._parts(list(enumerate(drawn))):
            rows = [self._row(name, index, given, random.Random(f"{seed} {place}")) for place, index in part]
            batches.append(self.maker.batch(rows))
            ids.append([self.pairs.samples[index].id for _, index in part])
        # One divisor for all micro-batches: with one each, the weight of a caption would depend on its neighbours
        total = torch.stack([batch.weights.sum() for batch in batches]).mean()
        yield from zip([(batch, total) for batch in batches], ids, strict=True)

    def _parts(self, drawn: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """This process's part of each micro-batch."""
        size = len(drawn) // self.maker.config.loop.accumulate
        for start in range(0, len(drawn), size):
            yield drawn[start : start + size][rank() :: world_size()]

    def _row(self, name: str, index: int, given: float, rng: random.Random) -> Row:
        chance = Chance(rng, given, lambda rng: self.pairs.codes[rng.randrange(len(self.pairs))])
        return self.maker.kind(name).training_row(self.pairs.picture(index), self.maker.recipe, chance)

    def _weights(self, name: str) -> Tensor:
        """Float64 [P]: the sampling weight of each picture, 0 where it lacks what rows of this kind need."""
        kind = self.maker.kind(name)
        suits = torch.tensor([kind.suits(sample) for sample in self.pairs.samples])
        left_out = int((~suits).sum())
        if left_out == len(suits):
            raise DataError(f"mix.{name}: no training picture has a caption; set it to 0, or add captions")
        if left_out and rank() == 0:
            logger.warning("%d of %d pictures have no caption and are not used to %s", left_out, len(suits), name)
        return self.pairs.sampling_weights(self.maker.config.data.balance) * suits


def held_out_batches(
    pairs: CodedPairs, maker: RowMaker, kind: str = "draw", named_style: bool = True
) -> list[RowBatch]:
    """Fixed batches of `test_pictures` pictures spread over the split, each with its name in a fixed language.

    Raises `DataError` when no picture has what rows of this `kind` need.
    """
    rows_of = maker.kind(kind)
    suited = [index for index, sample in enumerate(pairs.samples) if rows_of.suits(sample)]
    if not suited:
        raise DataError(f"no held-out picture has a caption, which rows of the kind {kind!r} need")
    count = min(len(suited), maker.config.data.test_pictures)
    chosen = [suited[k * len(suited) // count] for k in range(count)]
    rows = [rows_of.held_out_row(pairs.picture(index), maker.text, named_style) for index in chosen]
    return [
        collate(maker.model.vocabulary, rows[i : i + HELD_OUT_BATCH], maker.config.text_weight)
        for i in range(0, count, HELD_OUT_BATCH)
    ]


def mean_bits(model: Transformer, batches: list[RowBatch], device: torch.device) -> dict[str, float]:
    """Mean `image_bits` and `text_bits` of a model over batches, by rows: the last batch may be smaller."""
    losses = [model.loss(batch.to(device)) for batch in batches]
    rows = [len(batch.tokens) for batch in batches]
    return {
        name: sum(float(loss[name]) * count for loss, count in zip(losses, rows, strict=True)) / sum(rows)
        for name in ("image_bits", "text_bits")
    }
