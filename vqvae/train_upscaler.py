"""Train the super-resolution model: `mmwudao train upscaler CONFIG`.

Reads shards of large pictures and learns to restore them from half their size: from pictures that were scaled down, and
from those again after the image tokenizer coded and decoded them, which is what a drawn picture looks like.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data.config import ConfigError
from data.images import to_square
from data.options import COUNT, SIDE, check_options, option
from data.reading import open_shards
from data.sample import DataError
from vqvae.model import VQVAE
from vqvae.psnr import psnr
from vqvae.storage.parts import content_hash, load_part, save_part
from vqvae.training.config import LoopConfig, ParallelConfig
from vqvae.training.loop import train_model
from vqvae.training.process import replica, replicas
from vqvae.training.task import Task
from vqvae.upscaler import SCALE, Upscaler, UpscalerConfig

BATCH = 32  # pictures that the tokenizer, or a measurement, takes at once


@dataclass
class UpscalerDataConfig:
    """Which pictures: a folder of shards, the splits, and the tokenizer whose decoded pictures are inputs too."""

    shards: str = "shards"
    train: str = "train"
    test: str = "test-concept"
    exclude_families: list[str] = field(default_factory=list)
    tokenizer: str = ""  # the folder of a trained tokenizer; none: scaled-down pictures alone
    image_size: int = option(
        256, "The side of the restored pictures in pixels, twice that of the inputs.", least=16, most=SIDE
    )
    crop: int = option(48, "The side of the part of an input that a step sees, in pixels.", least=8, most=SIDE)
    decoded: float = option(0.5, "That share of the inputs has been through the tokenizer.", least=0, most=1)
    train_pictures: int = option(
        20_000, "Train on at most this many pictures, all in memory: 300 KB each at 256 pixels.", least=1, most=COUNT
    )
    test_pictures: int = option(128, "Evaluate on this many pictures of the test split.", least=1, most=COUNT)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class UpscalerTrainConfig:
    """Everything that `mmwudao train upscaler` reads from its YAML file."""

    data: UpscalerDataConfig = field(default_factory=UpscalerDataConfig)
    model: UpscalerConfig = field(default_factory=UpscalerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass
class Pairs:
    """uint8: `large` [N, 3, 2S, 2S], the same at half the size in `small`, and `decoded` by the tokenizer, if any."""

    large: Tensor
    small: Tensor
    decoded: Tensor | None
    ids: list[str]


def train(config: UpscalerTrainConfig, resume: bool = False) -> Path:
    """Train the upscaler and save its averaged weights; returns their folder, `out`/upscaler.

    Raises `ValueError` for settings that do not fit the data.
    """
    return train_model(config.loop, lambda device: _task(config, device), resume, config.parallel)


def _task(config: UpscalerTrainConfig, device: torch.device) -> Task:
    data = config.data
    small = data.image_size // SCALE
    if data.image_size % SCALE or not 1 <= data.crop <= small:
        raise ConfigError(f"data.crop={data.crop} must lie in 1..{small}, half of an even data.image_size")
    tokenizer = load_part(VQVAE, data.tokenizer).float() if data.tokenizer else None
    test = read_pairs(data, data.test, data.test_pictures, tokenizer)
    pairs = read_pairs(data, data.train, data.train_pictures, tokenizer)

    def loss_of(wrapped: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        small, large = (part.to(device).float() / 255 for part in batch)
        return {"loss": F.l1_loss(wrapped(small), large)}

    def evaluate(averaged: nn.Module, step: int) -> dict[str, float]:
        figures = {"psnr": measure(averaged, test.small, test.large, device)}
        if test.decoded is not None:
            figures["psnr_decoded"] = measure(averaged, test.decoded, test.large, device)
        return figures

    model = Upscaler(config.model).to(memory_format=torch.channels_last)
    origin = {"image tokenizer (data.tokenizer)": content_hash(tokenizer) if tokenizer else ""}
    return Task(model, CropBatches(config, pairs), loss_of, evaluate, "upscaler", save_part, origin=origin)


def read_pairs(data: UpscalerDataConfig, split: str, limit: int, tokenizer: VQVAE | None) -> Pairs:
    """The first `limit` pictures of a split with their inputs. Raises `DataError` when there are none.

    `ValueError` when the tokenizer's stride does not divide the inputs.
    """
    examples = (
        (sample.id, image)
        for sample, image in open_shards(data.shards, split, by_node=False, captions=False)
        if sample.family not in data.exclude_families
    )
    larges: list[Tensor] = []
    smalls: list[Tensor] = []
    ids: list[str] = []
    for name, image in islice(examples, limit):
        square = to_square(image, data.image_size)
        larges.append(_pixels(square))
        smalls.append(_pixels(to_square(square, data.image_size // SCALE)))
        ids.append(name)
    if not ids:
        raise DataError(f"{data.shards} holds no readable pictures of the chosen families and splits")
    small = torch.stack(smalls)
    decoded = torch.cat([_decoded(tokenizer, part) for part in small.split(BATCH)]) if tokenizer else None
    return Pairs(torch.stack(larges), small, decoded, ids)


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()


def _decoded(tokenizer: VQVAE, pictures: Tensor) -> Tensor:
    restored = tokenizer.decode(tokenizer.encode(pictures.float() / 255))
    return (restored * 255).round().to(torch.uint8)


def measure(model: nn.Module, inputs: Tensor, large: Tensor, device: torch.device) -> float:
    """Mean PSNR in dB over pictures of the enlarged uint8 `inputs` [N, 3, S, S] against `large` [N, 3, 2S, 2S]."""
    values = []
    for small, expected in zip(inputs.split(BATCH), large.split(BATCH), strict=True):
        made = model(small.to(device).float() / 255).clamp(0, 1)
        values.append(psnr(made, expected.to(device).float() / 255))
    return float(torch.cat(values).mean())


class CropBatches:
    """Random crops of random pairs; (seed, step) decides the draw, whatever the number of processes.

    Inputs that have not been through the tokenizer are scaled down by Lanczos or by averaging 2x2 pixels, by a coin:
    pictures found elsewhere have been made small in either way.
    """

    def __init__(self, config: UpscalerTrainConfig, pairs: Pairs) -> None:
        self.data, self.config, self.pairs = config.data, config.loop, pairs

    def __call__(self, step: int) -> Iterator[tuple[tuple[Tensor, Tensor], list[str]]]:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        size = self.config.batch_size
        drawn = torch.randint(len(self.pairs.ids), (size,), generator=generator)
        corners = torch.randint(self.data.image_size // SCALE - self.data.crop + 1, (size, 2), generator=generator)
        chances = torch.rand(size, generator=generator)
        for part in torch.arange(size)[replica() :: replicas()].chunk(self.config.accumulate):
            crops = [self._crop(int(drawn[k]), corners[k].tolist(), float(chances[k])) for k in part]
            small, large = (torch.stack(pictures) for pictures in zip(*crops, strict=True))
            yield (small, large), [self.pairs.ids[int(drawn[k])] for k in part]

    def _crop(self, index: int, corner: list[int], chance: float) -> tuple[Tensor, Tensor]:
        """An input uint8 [3, crop, crop] and its large picture; `chance` in 0..1 decides how it was made small."""
        crop, share = self.data.crop, self.data.decoded if self.pairs.decoded is not None else 0.0
        large = _window(self.pairs.large[index], [SCALE * place for place in corner], SCALE * crop)
        if self.pairs.decoded is not None and chance < share:
            return _window(self.pairs.decoded[index], corner, crop), large
        if chance < (1 + share) / 2:
            return _window(self.pairs.small[index], corner, crop), large
        return F.avg_pool2d(large.float(), SCALE).round().to(torch.uint8), large


def _window(picture: Tensor, corner: list[int], size: int) -> Tensor:
    top, left = corner
    return picture[:, top : top + size, left : left + size]
