"""Train retrieval towers: `mmwudao train retrieval CONFIG`.

Reads shards, trains the two towers with the shared loop, and logs recall on held-out splits. Under torchrun, each
process takes its share of every batch, and pictures are compared with the texts of all processes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.concepts import label_of
from data.config import ConfigError
from data.sample import Sample
from data.text import TextTokenizer
from retrieval.encoders.text_encoder import load_text_encoder
from retrieval.towers.base import Tokens, Towers, load_towers, save_towers, to_device
from retrieval.towers.multiscale import MultiScaleConfig, MultiScaleTowers
from retrieval.towers.pretrained import HeadsConfig, PretrainedTowers
from retrieval.training.damage import PictureDamage
from retrieval.training.inherit import (
    BatchSettings,
    InheritedBatch,
    InheritedBatches,
    InitConfig,
    KeepConfig,
    PictureFeatures,
    PretrainedClip,
    TextVectors,
    build_pretrained_towers,
    imagenet_names,
    mixed_trunk,
    texts_of,
    warm_up_heads,
)
from retrieval.training.lessons import InheritConfig, Lesson, Lessons
from retrieval.training.objectives import Objective, ObjectiveConfig, build_objective
from retrieval.training.pairs import (
    AugmentConfig,
    PairsConfig,
    Pictures,
    RetrievalCaptionConfig,
    StreamedPairs,
    augment,
    draw_captions,
    mirror,
)
from retrieval.training.split_recall import measure_split_recall, quiet
from retrieval.training.student import TextHeadFit
from vqvae.training.checkpoints import has_checkpoint
from vqvae.training.config import LoopConfig, ParallelConfig
from vqvae.training.loop import train_model
from vqvae.training.process import replica, replicas
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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    text_model: str = "text.model"  # SentencePiece
    open_clip: str = ""  # the name of an open_clip architecture, which replaces `model`
    init: InitConfig = field(default_factory=InitConfig)  # encoders to start from, which replace `model` by `heads`
    heads: HeadsConfig = field(default_factory=HeadsConfig)  # of towers that start from `init`
    keep: KeepConfig = field(default_factory=KeepConfig)  # what such towers must not forget
    rates: dict[str, float] = field(default_factory=dict)  # part or pattern -> factor of its learning rate
    inherit: InheritConfig = field(default_factory=InheritConfig)  # for towers without `init`
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
    lesson: Lesson | None = None


def train(config: RetrievalTrainConfig, resume: bool = False) -> Path:
    """Train the towers and save their averaged weights; returns their folder, `out`/towers.

    Raises `ValueError` for settings that do not fit the data or the towers.
    """
    return train_model(config.loop, lambda device: _task(config, device), resume, config.parallel)


def _task(config: RetrievalTrainConfig, device: torch.device) -> Task:
    if config.init.text:
        if config.inherit.text:
            raise ConfigError("inherit.text is for towers with a text tower of their own, and init.text gives them one")
        return _inherited_task(config, device)
    towers = _start(config)
    loss = _loss(config, towers, device)
    objective = build_objective(towers, config.objective, config.freeze)
    if config.checkpoint_gradients:
        towers.checkpoint_gradients()
    batches = (InMemoryTowerBatches if config.data.in_memory else StreamedTowerBatches)(config, towers)
    tests = {
        split: Pictures(config.data, split, towers.image_size, config.data.test_pictures) for split in config.data.test
    }

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

    follows = config.objective.name == "moco"
    return Task(
        objective, batches, loss, evaluate, "towers", save, rates=_rates(config), origin=_origin(config, towers),
        unshardable="moco's second towers follow whole weights; take objective.name=clip" if follows else "",
    )  # fmt: skip


def _inherited_task(config: RetrievalTrainConfig, device: torch.device) -> Task:
    """Towers that start from trained encoders, of which the text encoder is frozen: its vectors are computed once."""
    towers = build_pretrained_towers(config.init, config.heads, config.keep)
    if config.checkpoint_gradients:
        towers.checkpoint_gradients()
    loss = _loss(config, towers, device)
    pictures = Pictures(config.data, config.data.train, towers.image_size)
    untouched = {name: tensor.clone() for name, tensor in towers.trunk.state_dict().items()}
    encoder = towers.text_encoder
    vectors = TextVectors.prepare(encoder, texts_of(pictures.samples), Path(config.loop.out) / "texts.safetensors")
    names = imagenet_names(towers.config.trunk.num_classes) if config.keep.classes else []
    towers.text_head.standardise_by(vectors.vectors)
    features = PictureFeatures.prepare(towers.trunk, pictures.pixels, Path(config.loop.out) / "pictures.safetensors")
    towers.image_head.standardise_by(features.pooled)
    objective = PretrainedClip(
        towers, config.objective, [*config.freeze, "text_encoder"], config.keep, encoder.encode(names)
    )
    loop = config.loop
    settings = BatchSettings(
        loop.batch_size, loop.accumulate, loop.seed, config.data.balance, config.keep.negatives, config.captions,
        config.augment.mirror,
    )  # fmt: skip
    batches = InheritedBatches(pictures, features, vectors, settings)
    if not has_checkpoint(Path(config.loop.out)):  # a checkpoint holds trained heads
        warm_up_heads(objective, batches, config.heads.warm_steps, device)
    tests = {
        split: Pictures(config.data, split, towers.image_size, config.data.test_pictures) for split in config.data.test
    }

    @contextmanager
    def finished(averaged: nn.Module) -> Iterator[PretrainedTowers]:
        assert isinstance(averaged, PretrainedClip)
        if len(averaged.get_buffer("names")):
            averaged.towers.name_classes(averaged.get_buffer("names"))
        with mixed_trunk(averaged.towers.trunk, untouched, config.keep.wise):
            yield averaged.towers

    def evaluate(averaged: nn.Module, step: int) -> dict[str, float]:
        figures: dict[str, float] = {}
        with finished(averaged) as mixed:
            for split, pictures in tests.items():
                found = measure_split_recall(mixed, pictures)
                figures |= {f"{split}/{name}": value for name, value in found.items()}
        return figures

    fit = None
    if config.init.student:
        student = load_text_encoder(Path(config.init.student))
        fit = TextHeadFit(student, vectors, Path(config.loop.out) / "student.safetensors")

    def save(averaged: nn.Module, folder: Path) -> None:
        with finished(averaged) as mixed, torch.enable_grad():
            save_towers(fit(mixed, config.init.student_steps) if fit else mixed, folder)

    return Task(
        objective, batches, loss, evaluate, "towers", save, rates=_rates(config), origin=_origin(config, towers)
    )


def _loss(
    config: RetrievalTrainConfig, towers: Towers, device: torch.device
) -> Callable[[nn.Module, TowerBatch | InheritedBatch], dict[str, Tensor]]:
    """What the objective makes of a batch, its pictures augmented. Raises `ModelError` for a tokenizer's folder."""
    damage = PictureDamage(config.augment, device)

    def loss_of(wrapped: nn.Module, batch: TowerBatch | InheritedBatch) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(batch.seed)
        pixels = damage(augment(batch.pixels.to(device).float() / 255, config.augment, generator), generator)
        inputs = towers.normalise(pixels), to_device(batch.tokens, device), batch.labels.to(device)
        lesson = batch.lesson if isinstance(batch, TowerBatch) else None
        return wrapped(*inputs, lesson) if lesson else wrapped(*inputs)

    return loss_of


def _rates(config: RetrievalTrainConfig) -> dict[str, float]:
    """Patterns of parameters of the objective -> factors, from those of parts of the towers."""
    return {f"towers.{part}*": factor for part, factor in config.rates.items()}


def _origin(config: RetrievalTrainConfig, towers: Towers) -> dict[str, str]:
    """What the weights of a run depend on, see `Task`."""
    return {
        "kind of towers": towers.kind,
        "text model (text_model)": getattr(getattr(towers, "config", None), "text_hash", ""),
        "objective (objective.name)": config.objective.name,
    }


class TowerBatches:
    """Batches of pictures and their captions: the part that does not depend on where the pictures come from."""

    def __init__(self, config: RetrievalTrainConfig, towers: Towers) -> None:
        self.config, self.towers = config, towers
        self.size = config.loop.batch_size // (config.loop.accumulate * replicas())
        self.lessons: Lessons | None = None
        if config.inherit.text:
            file = Path(config.loop.out) / "texts.safetensors"
            self.lessons = Lessons(config.inherit, towers, self.texts(), file)

    def texts(self) -> list[str]:
        """The texts that are known before the first step: those of pictures in memory."""
        return []

    def batch(self, samples: list[Sample], pixels: Tensor, seed: str) -> tuple[TowerBatch, list[str]]:
        """The batch of `samples` and `pixels` with captions drawn by `seed`, and the ids of the samples."""
        rng = random.Random(seed)
        captions = [draw_captions(sample, self.config.captions, rng) for sample in samples]
        texts = [captions[k][view] for view in range(self.config.captions.per_picture) for k in range(len(samples))]
        labels = torch.tensor([label_of(sample) for sample in samples])
        with quiet():
            tokens = self.towers.tokenize(texts)
        seed_of_pixels = rng.getrandbits(62)
        pixels = mirror(pixels, samples, self.config.augment.mirror, rng)
        lesson = self.lessons(f"lesson {seed}") if self.lessons else None
        return TowerBatch(pixels, tokens, labels, seed_of_pixels, lesson), [sample.id for sample in samples]


class InMemoryTowerBatches(TowerBatches):
    """Random batches of pictures in memory; the seed and the step determine the draw."""

    def __init__(self, config: RetrievalTrainConfig, towers: Towers) -> None:
        self.pictures = Pictures(config.data, config.data.train, towers.image_size)
        super().__init__(config, towers)
        self.weights = self.pictures.weights(config.data.balance)
        if config.loop.batch_size > len(self.weights):
            raise ConfigError(f"loop.batch_size={config.loop.batch_size} exceeds the {len(self.weights)} pictures")

    def texts(self) -> list[str]:
        return texts_of(self.pictures.samples)

    def __call__(self, step: int) -> Iterator[tuple[TowerBatch, list[str]]]:
        loop = self.config.loop
        seed = loop.seed * 1_000_003 + step
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(self.weights, loop.batch_size, generator=generator)
        for micro, part in enumerate(drawn[replica() :: replicas()].split(self.size)):
            samples = [self.pictures.samples[index] for index in part.tolist()]
            yield self.batch(samples, self.pictures.pixels[part], f"{seed} {replica()} {micro}")


class StreamedTowerBatches(TowerBatches):
    """Batches from shards of any size, each picture once an epoch; (seed, step) decides which."""

    def __init__(self, config: RetrievalTrainConfig, towers: Towers) -> None:
        super().__init__(config, towers)
        self.pairs = StreamedPairs(config.data, towers.image_size, config.loop.seed)

    def __call__(self, step: int) -> Iterator[tuple[TowerBatch, list[str]]]:
        loop = self.config.loop
        seed, first = loop.seed * 1_000_003 + step, step * loop.batch_size
        own = range(first, first + loop.batch_size)[replica() :: replicas()]
        for micro in range(loop.accumulate):
            positions = own[micro * self.size : (micro + 1) * self.size]
            yield self.batch(*self.pairs.take(positions), f"{seed} {replica()} {micro}")


def _start(config: RetrievalTrainConfig) -> Towers:
    """The towers to train: trained ones, an open_clip architecture, or our own with random weights."""
    if config.start_from:
        return load_towers(config.start_from)
    if config.open_clip:
        from retrieval.towers.open_clip import OpenClipTowers  # this imports all of open_clip

        return OpenClipTowers.from_scratch(config.open_clip, Path(config.text_model))
    text = TextTokenizer(Path(config.text_model))
    return MultiScaleTowers(replace(config.model, num_text_pieces=text.vocab_size, text_hash=text.content_hash), text)
