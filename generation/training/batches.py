"""Batches of rows: random ones to learn from, and fixed ones of held-out pictures.

Shapes: P pictures, h x w codes in a picture.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.sample import DataError
from generation.captions import allowed_texts
from generation.rows.base import Chance, PieceEncoder, RowKind, RowRecipe
from generation.rows.mixture import ROW_KINDS, Mixture
from generation.rows.prompt import FeatureSource
from generation.rows.row import Row, RowBatch, collate, pack
from generation.training.config import GeneratorTrainConfig
from generation.training.pairs import CodedPairs
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from vqvae.training.process import rank, replica, replicas

HELD_OUT_BATCH = 32  # rows

logger = logging.getLogger(__name__)


@dataclass
class RowMaker:
    """What turns pictures into rows: the text tokenizer, the sizes of the model, and the training's settings.

    `features` gives the vectors of prompts. Raises `ValueError` where the model reads them and there is no source, and
    for a model whose rows are not ours.
    """

    text: PieceEncoder
    model: TransformerConfig
    config: GeneratorTrainConfig
    features: FeatureSource | None = None

    def __post_init__(self) -> None:
        if self.model.frame.own or self.model.image_head != "linear":
            raise ValueError("a model with a prompt frame of its own, such as imported Janus, cannot be trained here")
        if self.model.prompt_features.used and self.features is None:
            raise ValueError("this generator reads vectors of its towers in the prompt: give their source")

    def kind(self, name: str) -> RowKind:
        """The rows of a kind, in the format of this model."""
        return ROW_KINDS[name](self.model)

    @property
    def recipe(self) -> RowRecipe:
        """How training rows are made."""
        config = self.config
        noise = config.code_noise, config.code_mask
        read = self.features, config.from_picture
        return RowRecipe(self.text, config.captions, *noise, *read, config.match.texts)

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
        weights, size = self.weights[name], config.loop.batch_size * (config.match.batch if name == "match" else 1)
        drawn = torch.multinomial(weights, size, replacement=True, generator=generator).tolist()
        batches, ids = [], []
        # Each place in the batch has a random stream of its own, so that any number of processes draws the same rows
        for part in self._parts(list(enumerate(drawn))):
            rows = [self._row(name, index, given, random.Random(f"{seed} {place}")) for place, index in part]
            batches.append(replace(self.maker.batch(rows), kind=name))
            ids.append([self.pairs.samples[index].id for _, index in part])
        # One divisor for all micro-batches: with one each, the weight of a caption would depend on its neighbours
        total = torch.stack([batch.weights.sum() for batch in batches]).mean()
        yield from zip([(batch, total) for batch in batches], ids, strict=True)

    def _parts(self, drawn: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """This process's part of each micro-batch."""
        size = len(drawn) // self.maker.config.loop.accumulate
        for start in range(0, len(drawn), size):
            yield drawn[start : start + size][replica() :: replicas()]

    def _row(self, name: str, index: int, given: float, rng: random.Random) -> Row:
        chance = Chance(rng, given, lambda rng: self.pairs.codes[rng.randrange(len(self.pairs))])
        return self.maker.kind(name).training_row(self.pairs.picture(index, rng), self.maker.recipe, chance)

    def _weights(self, name: str) -> Tensor:
        """Float64 [P]: the sampling weight of each picture, 0 where it lacks what rows of this kind need."""
        kind = self.maker.kind(name)
        suits = torch.tensor([kind.suits(sample) for sample in self.pairs.samples])
        left_out = int((~suits).sum())
        if left_out == len(suits):
            lacking = kind.lacking
            raise DataError(f"mix.{name}: no training picture has a {lacking}; set it to 0, or add {lacking}s")
        if left_out and rank() == 0:
            told = left_out, len(suits), kind.lacking, name
            logger.warning("%d of %d pictures have no %s and are not used to %s", *told)
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
        raise DataError(f"no held-out picture has a {rows_of.lacking}, which rows of the kind {kind!r} need")
    count = min(len(suited), maker.config.data.test_pictures)
    chosen = [suited[k * len(suited) // count] for k in range(count)]
    rows = [rows_of.held_out_row(pairs.picture(index), maker.recipe, named_style) for index in chosen]
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


@torch.inference_mode()
def exact_answers(model: Transformer, batch: RowBatch) -> list[list[bool]]:
    """For each row, whether greedy search finds the text that is learned in each of its segments, in their order.

    One pass tells: greedy search follows the learned text as long as each of its pieces is the likeliest. `batch` is
    padded, and holds rows that answer or describe.
    """
    assert batch.segments is not None
    assert batch.lengths is None
    hidden = model(batch.tokens, batch.positions, segments=batch.segments, features=batch.features)
    learned = batch.weights > 0
    vocab = model.config.vocabulary
    logits = model.logits(hidden[learned]).float() + allowed_texts(vocab, hidden.device)
    before = torch.nn.functional.pad(torch.where(learned, batch.segments, 0), (1, -1))
    begins = (before != batch.segments)[learned]  # where greedy search does not let an answer end
    logits[:, vocab.command("[SEP]")] += torch.where(begins, -torch.inf, 0)
    right = torch.ones_like(learned)
    right[learned] = logits.argmax(-1) == batch.targets[learned]
    found = []
    for segments, hits in zip(batch.segments.cpu(), right.cpu(), strict=True):
        found.append([bool(hits[segments == number].all()) for number in range(1, int(segments.max()) + 1)])
    return found


def answer_accuracy(model: Transformer, batches: list[RowBatch], device: torch.device) -> float:
    """The share of all questions of `batches` that greedy search answers exactly."""
    hits = [hit for batch in batches for row in exact_answers(model, batch.to(device)) for hit in row]
    return sum(hits) / len(hits)
