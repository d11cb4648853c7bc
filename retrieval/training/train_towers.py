"""Train retrieval towers: `mmwudao train retrieval CONFIG`.

Reads shards, trains the two towers with the shared loop, and logs recall on held-out splits. Under torchrun, every
process takes its part of each batch, and pictures are compared with the texts of all processes.
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
from retrieval.towers.ours import EmojiTowers, TowersConfig
from retrieval.training.objectives import Objective, ObjectiveConfig, build_objective
from retrieval.training.pairs import (
    AugmentConfig,
    CaptionConfig,
    PairsConfig,
    Pictures,
    augment,
    draw_captions,
    label_of,
    queries_by_language,
    read_pairs,
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
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: TowersConfig = field(default_factory=TowersConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    text_model: str = "text.model"  # SentencePiece
    open_clip: str = ""  # an architecture that open_clip knows by this name takes the place of `model`
    start_from: str = ""  # folder of trained towers of any kind: they go on as they are, with their own text model
    # parts that stay as they are, by name or pattern: [trunk, image_head] locks the image tower
    freeze: list[str] = field(default_factory=list)
    checkpoint_gradients: bool = False  # less memory, a third more time


class Batch(NamedTuple):
    """uint8 pictures [N, 3, S, S], the tokens of their texts (see `retrieval.training.objectives`), concepts [N], a seed."""

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
    batches = (InMemoryBatches if config.data.in_memory else StreamedBatches)(config, towers)
    tests = {
        split: Pictures(config.data, split, towers.image_size, config.data.test_pictures) for split in config.data.test
    }

    def loss_of(wrapped: nn.Module, batch: Batch) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(batch.seed)
        pixels = augment(batch.pixels.to(device).float() / 255, config.augment, generator)
        return wrapped(towers.normalise(pixels), to_device(batch.tokens, device), batch.labels.to(device))

    def evaluate(averaged: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(averaged, Objective)
        figures: dict[str, float] = {}
        for split, pictures in tests.items():
            found = measure_recall(averaged.towers, pictures)
            figures |= {f"{split}/{name}": value for name, value in found.items()}
        return figures

    def save(averaged: nn.Module, folder: Path) -> None:
        assert isinstance(averaged, Objective)
        save_towers(averaged.towers, folder)

    return Task(objective, batches, loss_of, evaluate, "towers", save)


def measure_recall(towers: Towers, pictures: Pictures, batch_size: int = 64) -> dict[str, float]:
    """Recall at 1 and 10 and the median rank of text to image in each language, their means, and image to text.

    A query is the name of a concept in one language; any picture of the concept is right. The other way, the
    candidates of a picture are the names in one language, and the figures are means over languages.
    """
    images = torch.cat(
        [towers.encode_image(towers.normalise(part.float() / 255)) for part in pictures.pixels.split(batch_size)]
    )
    figures: dict[str, float] = {}
    sums: dict[str, list[float]] = {}
    for language, (names, labels) in queries_by_language(pictures.samples).items():
        with quiet():
            texts = towers.encode_text(names)
        found = recall_figures(ranks(texts, images, labels, pictures.labels))
        back = recall_figures(ranks(images, texts, pictures.labels, labels))
        figures[f"text_recall@10/{language}"] = found["recall@10"]
        for way, measured in (("text", found), ("image", back)):
            for name in ("recall@1", "recall@10", "median_rank"):
                sums.setdefault(f"{way}_{name}", []).append(measured[name])
    return figures | {name: sum(values) / len(values) for name, values in sums.items()}


class PairBatches:
    """What both kinds of batches share: captions and tokens of drawn samples."""

    def __init__(self, config: RetrievalTrainConfig, towers: Towers) -> None:
        self.config, self.towers = config, towers
        self.size = config.loop.batch_size // (config.loop.accumulate * world_size())

    def batch(self, samples: list[Sample], pixels: Tensor, seed: str) -> tuple[Batch, list[str]]:
        rng = random.Random(seed)
        captions = [draw_captions(sample, self.config.captions, rng) for sample in samples]
        texts = [captions[k][view] for view in range(self.config.captions.per_picture) for k in range(len(samples))]
        labels = torch.tensor([label_of(sample) for sample in samples])
        with quiet():
            tokens = self.towers.tokenize(texts)
        return Batch(pixels, tokens, labels, rng.getrandbits(62)), [sample.id for sample in samples]


class InMemoryBatches(PairBatches):
    """Random batches of pictures held as uint8; (seed, step) decides the draw."""

    def __init__(self, config: RetrievalTrainConfig, towers: Towers) -> None:
        super().__init__(config, towers)
        self.pictures = Pictures(config.data, config.data.train, towers.image_size)
        self.weights = self.pictures.weights(config.data.balance)
        if config.loop.batch_size > len(self.weights):
            raise ConfigError(f"loop.batch_size={config.loop.batch_size}, but there are {len(self.weights)} pictures")

    def __call__(self, step: int) -> Iterator[tuple[Batch, list[str]]]:
        loop = self.config.loop
        seed = loop.seed * 1_000_003 + step
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(self.weights, loop.batch_size, generator=generator)
        for micro, part in enumerate(drawn[rank() :: world_size()].split(self.size)):
            samples = [self.pictures.samples[index] for index in part.tolist()]
            yield self.batch(samples, self.pictures.pixels[part], f"{seed} {rank()} {micro}")


class StreamedBatches(PairBatches):
    """Batches from shards read with replacement, for data of any size.

    After a resume the stream starts anew at the seed of that step: another order, never the same start again.
    """

    stream: Iterator[tuple[Sample, Tensor]] | None = None

    def __call__(self, step: int) -> Iterator[tuple[Batch, list[str]]]:
        data = self.config.data
        seed = self.config.loop.seed * 1_000_003 + step
        if self.stream is None:
            self.stream = read_pairs(
                data, data.train, self.towers.image_size, shuffle=data.shuffle, seed=seed, resampled=True
            )
        for micro in range(self.config.loop.accumulate):
            yield self.batch(*take(self.stream, self.size), f"{seed} {rank()} {micro}")


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings in `logging`: that the longest captions are cut is known, and said of each would be every step."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _start(config: RetrievalTrainConfig) -> Towers:
    if config.start_from:
        return load_towers(config.start_from)
    if config.open_clip:
        from retrieval.towers.open_clip import OpenClipTowers  # imports all of open_clip

        return OpenClipTowers.from_scratch(config.open_clip, Path(config.text_model))
    text = TextTokenizer(Path(config.text_model))
    return EmojiTowers(replace(config.model, num_text_pieces=text.vocab_size, text_hash=text.content_hash), text)
