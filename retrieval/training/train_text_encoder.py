"""Distil a text encoder: `mmwudao train text-encoder CONFIG`.

A student, cut out of its teacher (`retrieval.encoders.pruning`), learns the teacher's vectors of many texts: knowledge
inheritance, as in CPM-2 (Zhang et al. 2021, arXiv:2106.10715). With 4 bits it learns with rounded matrices. With
`locked_image` it learns to find the pictures of trained towers as well, and takes the place of their text encoder.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from data.characters import decode_text
from data.config import ConfigError
from data.options import DEPTH, check_options, option
from retrieval.encoders.pruning import prune_text_encoder
from retrieval.encoders.text_encoder import TextEncoder, load_text_encoder, save_text_encoder
from retrieval.towers.base import save_towers
from retrieval.training.inherit import TextVectors
from retrieval.training.locked_image import (
    CaptionBatch,
    LockedImageConfig,
    PictureBank,
    PictureFinder,
    tuned_towers,
)
from vqvae.storage.blocks import BLOCK, pack_four_bit, unpack_four_bit
from vqvae.storage.parts import content_hash
from vqvae.training.config import LoopConfig, ParallelConfig
from vqvae.training.loop import train_model
from vqvae.training.process import replica, replicas
from vqvae.training.task import Task

LIKE_LENGTH = 40  # texts that are padded to one length


@dataclass
class TextEncoderTrainConfig:
    """Everything that `mmwudao train text-encoder` reads from its YAML file."""

    teacher: str = option("", "The folder of the text encoder to learn from.")
    student: str = option(
        "",
        "A student to go on from, instead of one cut out by `pieces`, `layers` and `max_tokens`; with "
        "locked_image.towers, the text encoder of those towers by default.",
    )
    texts: list[str] = field(default_factory=list)  # files of UTF-8, one text a line
    held_out: float = option(0.02, "Share of the texts that are for testing alone.", least=0, below=1)
    pieces: int = option(26_000, "Rows of the student's pieces; the most frequent of the texts are kept.", least=300)
    layers: list[int] = option([0, 2, 5, 8, 11], "The teacher's layers to keep, from 0.", least=0, most=DEPTH)
    max_tokens: int = option(64, "Positions of the student.", least=2, most=8192)
    bits: int = option(4, "Of a stored number: 4, 16 or 32.", least=4, most=32)
    locked_image: LockedImageConfig = field(default_factory=LockedImageConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        check_options(self)
        if self.bits not in (4, 16, 32):
            raise ConfigError(f"bits is 4, 16 or 32, not {self.bits}")


class RoundedMatrix(nn.Module):
    """A matrix as its 4-bit blocks give it back; the gradient passes straight through."""

    def forward(self, weight: Tensor) -> Tensor:
        rounded = unpack_four_bit(pack_four_bit(weight), tuple(weight.shape))
        return weight + (rounded - weight).detach()


class Distillation(nn.Module):
    """The student and its loss: the squared distance of unit vectors, standardised by the teacher's, a dimension."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, student: TextEncoder, vectors: Tensor) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("mean", vectors.float().mean(dim=0))
        self.register_buffer("deviation", vectors.float().std(dim=0).clamp(min=1e-4))

    def forward(self, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Tokens of N texts and the teacher's vectors [N, width]."""
        return self.distance(self.encode(tokens), targets)

    def distance(self, vectors: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The loss of the student's unit vectors and the teacher's, both [N, width]."""
        own, wanted = ((part - self.mean) / self.deviation for part in (vectors, targets))
        cosine = F.cosine_similarity(own.detach(), wanted).mean()
        return {"loss": (own - wanted).square().mean(), "cosine": cosine}

    def encode(self, tokens: Tensor) -> Tensor:
        """The student's unit vectors, float32 [N, width], computed for texts of like length together."""
        lengths = (tokens != self.student.config.pad_token).sum(dim=1)
        order = lengths.argsort()
        with parametrize.cached():  # matrices are rounded once for all parts
            parts = [self.student(tokens[rows, : int(lengths[rows].max())]) for rows in order.split(LIKE_LENGTH)]
        return F.normalize(torch.cat(parts)[order.argsort()].float(), dim=1)


class TextTowerTuning(nn.Module):
    """A distillation, and a text tower that finds pictures; the sum of both losses."""

    def __init__(self, distillation: Distillation, finder: PictureFinder, weight: float) -> None:
        super().__init__()
        self.distillation, self.finder, self.weight = distillation, finder, weight

    def forward(self, tokens: Tensor, targets: Tensor, captions: CaptionBatch) -> dict[str, Tensor]:
        longest = max(tokens.shape[1], captions.tokens.shape[1])
        pad = self.distillation.student.config.pad_token
        both = [F.pad(part, (0, longest - part.shape[1]), value=pad) for part in (tokens, captions.tokens)]
        vectors, encoded = self.distillation.encode(torch.cat(both)).split([len(tokens), len(captions.tokens)])
        figures = self.distillation.distance(vectors, targets)
        with torch.autocast(tokens.device.type, enabled=False):  # logits need float32
            contrast = self.finder(encoded, captions)
        distance = figures["loss"]
        return {
            **figures, "loss": distance + self.weight * contrast,
            "distance": distance.detach(), "contrast": contrast.detach(),
        }  # fmt: skip


class TextBatch(NamedTuple):
    """Tokens of N texts, the teacher's vectors of them [N, width], and captions of pictures to find."""

    tokens: Tensor
    targets: Tensor
    captions: CaptionBatch | None


class TextBatches:
    """Texts drawn by the seed and the step, of like length in a micro-batch, and the teacher's vectors of them.

    With a `bank`, each micro-batch holds captions of its pictures as well, `bank.config.batch` of each.
    """

    def __init__(
        self, student: TextEncoder, texts: list[str], vectors: TextVectors, loop: LoopConfig,
        bank: PictureBank | None = None,
    ) -> None:  # fmt: skip
        self.student, self.texts, self.vectors, self.loop, self.bank = student, texts, vectors, loop, bank

    def __call__(self, step: int) -> Iterator[tuple[TextBatch, list[str]]]:
        loop = self.loop
        rng = random.Random(f"{loop.seed} {step}")
        drawn = rng.sample(self.texts, min(loop.batch_size, len(self.texts)))[replica() :: replicas()]
        drawn.sort(key=len)
        size = -(-len(drawn) // loop.accumulate)
        for start in range(0, len(drawn), size):
            part = drawn[start : start + size]
            captions = self.bank.draw(self.student, f"{loop.seed} {step} {start}") if self.bank else None
            yield TextBatch(self.student.tokenize(part), self.vectors(part), captions), part


def train(config: TextEncoderTrainConfig, resume: bool = False) -> Path:
    """Train the student and save it; returns its folder, `out`/text-encoder, or `out`/towers with `locked_image`.

    Raises `ConfigError`, `ModelError`.
    """
    return train_model(config.loop, lambda device: _task(config, device), resume, config.parallel)


def _task(config: TextEncoderTrainConfig, device: torch.device) -> Task:
    teacher = load_text_encoder(Path(config.teacher))
    out = Path(config.loop.out)
    bank = PictureBank(config.locked_image, out / "pictures.safetensors") if config.locked_image.towers else None
    texts = list(dict.fromkeys([*read_texts(config.texts), *(bank.texts() if bank else [])]))
    # where bfloat16 pays in training it pays here, and these vectors differ by a ten-thousandth of their spread
    with torch.autocast(device.type, torch.bfloat16, enabled=config.loop.precision == "bfloat16"):
        vectors = TextVectors.prepare(teacher, texts, out / "texts.safetensors")
    shuffled = random.Random(0).sample(texts, len(texts))
    count = int(config.held_out * len(texts))
    tests, trained = shuffled[:count], shuffled[count:]
    student = _student(config, teacher, trained, bank)
    origin = {"teacher (teacher)": content_hash(teacher)}
    distillation = Distillation(student, vectors.vectors)
    model: nn.Module = distillation
    if bank:
        model = TextTowerTuning(distillation, PictureFinder(bank.towers), config.locked_image.weight)
        origin["towers (locked_image.towers)"] = content_hash(bank.towers)

    def loss_of(wrapped: nn.Module, batch: TextBatch) -> dict[str, Tensor]:
        parts = batch.tokens.to(device), batch.targets.to(device)
        return wrapped(*parts, batch.captions.to(device)) if batch.captions else wrapped(*parts)

    def evaluate(averaged: nn.Module, step: int) -> dict[str, float]:
        own = averaged.distillation if isinstance(averaged, TextTowerTuning) else averaged
        assert isinstance(own, Distillation)
        sums: dict[str, float] = {}
        ordered = sorted(tests, key=len)
        for start in range(0, len(ordered), 128):
            part = ordered[start : start + 128]
            figures = own(own.student.tokenize(part).to(device), vectors(part).to(device))
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(part) / len(ordered)
        if bank:
            assert isinstance(averaged, TextTowerTuning)
            sums |= bank.measure(averaged.finder, own.student)
        return sums

    def save(averaged: nn.Module, folder: Path) -> None:
        if isinstance(averaged, TextTowerTuning):
            assert bank is not None
            plain = plain_text_encoder(averaged.distillation.student)
            save_towers(tuned_towers(bank.towers, plain, averaged.finder), folder)
        else:
            assert isinstance(averaged, Distillation)
            save_text_encoder(plain_text_encoder(averaged.student), folder)

    batches = TextBatches(student, trained, vectors, config.loop, bank)
    return Task(model, batches, loss_of, evaluate, "towers" if bank else "text-encoder", save, origin=origin)


def _student(
    config: TextEncoderTrainConfig, teacher: TextEncoder, texts: list[str], bank: PictureBank | None
) -> TextEncoder:
    """The student of the first step. It drops nothing out: it has far fewer weights than its teacher, and underfits."""
    start = load_text_encoder(Path(config.student)) if config.student else bank.towers.text_encoder if bank else None
    if start is not None:
        student = start
        widths = [part.config.architecture["hidden_size"] for part in (student, teacher)]
        if widths[0] != widths[1]:
            named = f"student {config.student}" if config.student else "text encoder of the towers"
            raise ConfigError(
                f"the {named} has vectors of {widths[0]} numbers, its teacher of {widths[1]}; "
                "name a student of this teacher, or leave `student` out"
            )
    else:
        student = prune_text_encoder(teacher, config.pieces, config.layers, texts, config.max_tokens)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    bits = cast(Literal[4, 16, 32], config.bits)  # the configuration allows no other
    student.config = replace(student.config, bits=bits, source=f"distilled from {teacher.config.source}")
    # the teacher's rows of pieces are kept as they are: most of them are met a few times in all
    student.transformer.embeddings.word_embeddings.weight.requires_grad_(False)
    if config.bits == 4:
        for module in student.transformer.encoder.modules():
            if isinstance(module, nn.Linear) and module.in_features % BLOCK == 0:
                parametrize.register_parametrization(module, "weight", RoundedMatrix(), unsafe=True)
    return student


def read_texts(files: list[str]) -> list[str]:
    """The lines of the files, each once, in order. Raises `ConfigError` without any."""
    found: dict[str, None] = {}
    for file in files:
        try:
            lines = decode_text(Path(file).read_bytes()).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read as lines of text in UTF-8 ({error})") from error
        found.update(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise ConfigError("texts names no file that holds a line of text")
    return list(found)


def plain_text_encoder(student: TextEncoder) -> TextEncoder:
    """A copy without parametrisations: its matrices are what the rounding gives."""
    plain = TextEncoder(student.config, student.serialised)
    state = {}
    for name, tensor in student.transformer.state_dict().items():
        if name.endswith(".parametrizations.weight.original"):
            rounded = unpack_four_bit(pack_four_bit(tensor), tuple(tensor.shape))
            state[name.replace(".parametrizations.weight.original", ".weight")] = rounded
        else:
            state[name] = tensor
    plain.transformer.load_state_dict(state)
    return plain.eval()
