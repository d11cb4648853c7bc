"""Train retrieval towers: `mmwudao train retrieval CONFIG`.

Reads shards, trains the two towers with the shared loop, and logs recall on held-out splits. Under torchrun, each
process takes its share of every batch, and pictures are compared with the texts of all processes.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.config import ConfigError
from data.sample import Sample
from data.text import TextTokenizer
from retrieval.evaluation.metrics import ranks, recall_figures
from retrieval.towers.base import Tokens, Towers, load_towers, save_towers, to_device
from retrieval.towers.multiscale import MultiScaleConfig, MultiScaleTowers
from retrieval.training.objectives import Objective, ObjectiveConfig, build_objective
from retrieval.training.pairs import (
    AugmentConfig,
    PairsConfig,
    Pictures,
    RetrievalCaptionConfig,
    augment,
    draw_captions,
    label_of,
    queries_by_language,
    stream_pairs,
    take,
)
from vqvae.training.config import LoopConfig
from vqvae.training.loop import train_model
from vqvae.training.process import rank, world_size
from vqvae.training.task import Task


@dataclass
class RetrievalTrainConfig:
    """Everything that `mmwudao train retrieval` reads from its YAML file."""

    data: PairsConfig = field(default_factory=PairsConfig)
    captions: RetrievalCaptionConfig = field(default_factory=RetrievalCaptionConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: MultiScaleConfig = field(default_factory=MultiScaleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    text_model: str = "text.model"  # SentencePiece
    open_clip: str = ""  # the name of an open_clip architecture, which replaces `model`
    start_from: str = ""  # a folder of trained towers of any kind to continue from, with their own text model
    # names or patterns of parts that are not trained: [trunk, image_head] freezes the image tower
    freeze: list[str] = field(default_factory=list)
    checkpoint_gradients: bool = False  # less memory for a third more time


class TowerBatch(NamedTuple):
    """uint8 pictures [N, 3, S, S], the tokens of M texts (see `objectives.py`), concepts [N], a seed."""

    pixels: Tensor
    tokens: Tokens
    labels: Tensor
    seed: int


def train(config: RetrievalTrainConfig, resume: bool = False) -> Path:
    """Train the towers and save their averaged weights; returns their folder, `out`/towers.

    Raises `ValueError` for settings that do not fit the data or the towers.
    """
    return train_model(config.loop, lambda device: _task(config, device), resume)


def _task(config: RetrievalTrainConfig, device: torch.device) -> Task:
    towers = _start(config)
    objective = build_objective(towers, config.objective, config.freeze)
    if config.checkpoint_gradients:
        towers.checkpoint_gradients()
    batches = (InMemoryTowerBatches if config.data.in_memory else StreamedTowerBatches)(config, towers)
    tests = {
        split: Pictures(config.data, split, towers.image_size, config.data.test_pictures) for split in config.data.test
    }

    def loss_of(wrapped: nn.Module, batch: TowerBatch) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(batch.seed)
        pixels = augment(batch.pixels.to(device).float() / 255, config.augment, generator)
        return wrapped(towers.normalise(pixels), to_device(batch.tokens, device), batch.labels.to(device))

    def evaluate(averaged: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(averaged, Objective)
        figures: dict[str, float] = {}
        for split, pictures in tests.items():
            found = measure_split_recall(averaged.towers, pictures)
            figures |= {f"{split}/{name}": value for name, value in found.items()}
        return figures

    def save(averaged: nn.Module, folder: Path) -> None:
        assert isinstance(averaged, Objective)
        save_towers(averaged.towers, folder)

    return Task(objective, batches, loss_of, evaluate, "towers", save)


def measure_split_recall(towers: Towers, pictures: Pictures, batch_size: int = 64) -> dict[str, float]:
    """Recall at 1 and 10 and the median rank of both directions, as means over languages; text recall of each language.

    For text to image, a query is the name of a concept in one language, and any picture of the concept is right. For
    image to text, the candidates are the names of all concepts in one language.
    """
    images = torch.cat(
        [towers.encode_image(towers.normalise(part.float() / 255)) for part in pictures.pixels.split(batch_size)]
    )
    figures: dict[str, float] = {}
    sums: dict[str, list[float]] = {}
    for language, (names, labels) in queries_by_language(pictures.samples).items():
        with quiet():
            texts = towers.encode_text(names)
        text_to_image = recall_figures(ranks(texts, images, labels, pictures.labels))
        image_to_text = recall_figures(ranks(images, texts, pictures.labels, labels))
        figures[f"text_recall@10/{language}"] = text_to_image["recall@10"]
        for way, measured in (("text", text_to_image), ("image", image_to_text)):
            for name in ("recall@1", "recall@10", "median_rank"):
                sums.setdefault(f"{way}_{name}", []).append(measured[name])
    return figures | {name: sum(values) / len(values) for name, values in sums.items()}


class TowerBatches:
    """Batches of pictures and their captions: the part that does not depend on where the pictures come from."""

    def __init__(self, config: RetrievalTrainConfig, towers: Towers) -> None:
        self.config, self.towers = config, towers
        self.size = config.loop.batch_size // (config.loop.accumulate * world_size())

    def batch(self, samples: list[Sample], pixels: Tensor, seed: str) -> tuple[TowerBatch, list[str]]:
        """The batch of `samples` and `pixels` with captions drawn by `seed`, and the ids of the samples."""
        rng = random.Random(seed)
        captions = [draw_captions(sample, self.config.captions, rng) for sample in samples]
        texts = [captions[k][view] for view in range(self.config.captions.per_picture) for k in range(len(samples))]
        labels = torch.tensor([label_of(sample) for sample in samples])
        with quiet():
            tokens = self.towers.tokenize(texts)
        return TowerBatch(pixels, tokens, labels, rng.getrandbits(62)), [sample.id for sample in samples]


class InMemoryTowerBatches(TowerBatches):
    """Random batches of pictures in memory; the seed and the step determine the draw."""

    def __init__(self, config: RetrievalTrainConfig, towers: Towers) -> None:
        super().__init__(config, towers)
        self.pictures = Pictures(config.data, config.data.train, towers.image_size)
        self.weights = self.pictures.weights(config.data.balance)
        if config.loop.batch_size > len(self.weights):
            raise ConfigError(f"loop.batch_size={config.loop.batch_size} exceeds the {len(self.weights)} pictures")

    def __call__(self, step: int) -> Iterator[tuple[TowerBatch, list[str]]]:
        loop = self.config.loop
        seed = loop.seed * 1_000_003 + step
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(self.weights, loop.batch_size, generator=generator)
        for micro, part in enumerate(drawn[rank() :: world_size()].split(self.size)):
            samples = [self.pictures.samples[index] for index in part.tolist()]
            yield self.batch(samples, self.pictures.pixels[part], f"{seed} {rank()} {micro}")


class StreamedTowerBatches(TowerBatches):
    """Batches from shards drawn with replacement, for data of any size.

    After a resume, the stream starts with the seed of that step: in another order, so that no start is repeated.
    """

    stream: Iterator[tuple[Sample, Tensor]] | None = None

    def __call__(self, step: int) -> Iterator[tuple[TowerBatch, list[str]]]:
        data = self.config.data
        seed = self.config.loop.seed * 1_000_003 + step
        if self.stream is None:
            self.stream = stream_pairs(
                data, data.train, self.towers.image_size, shuffle=data.shuffle, seed=seed, resampled=True
            )
        for micro in range(self.config.loop.accumulate):
            yield self.batch(*take(self.stream, self.size), f"{seed} {rank()} {micro}")


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings in `logging`: every step would report the captions that are cut, which is expected."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _start(config: RetrievalTrainConfig) -> Towers:
    """The towers to train: trained ones, an open_clip architecture, or our own with random weights."""
    if config.start_from:
        return load_towers(config.start_from)
    if config.open_clip:
        from retrieval.towers.open_clip import OpenClipTowers  # this imports all of open_clip

        return OpenClipTowers.from_scratch(config.open_clip, Path(config.text_model))
    text = TextTokenizer(Path(config.text_model))
    return MultiScaleTowers(replace(config.model, num_text_pieces=text.vocab_size, text_hash=text.content_hash), text)
