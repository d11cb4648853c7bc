"""Train the image tokenizer: `mmwudao train tokenizer CONFIG`.

Reads shards, trains the VQ-VAE with the shared loop, and logs PSNR, code usage and perplexity on a held-out split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.images import to_square
from data.reading import open_shards
from data.sample import DataError
from vqvae.model import VQVAE, Reconstruction, VQVAEConfig
from vqvae.psnr import psnr
from vqvae.storage.parts import save_part
from vqvae.training.config import LoopConfig
from vqvae.training.loop import train_model
from vqvae.training.process import rank, world_size
from vqvae.training.task import Task


@dataclass
class TokenizerDataConfig:
    """Which pictures: a folder of shards (or a pattern) and the splits to train and test on."""

    shards: str = "shards"
    train: str = "train"
    test: str = "test-concept"
    exclude_families: list[str] = field(default_factory=list)
    image_size: int = 128  # px; pictures are resized and cropped to this square
    test_pictures: int = 512
    # decode every training picture once and keep it as uint8; else shards are streamed (any number of pictures)
    in_memory: bool = False
    shuffle: int = 2000  # pictures in the shuffle buffer when streaming


@dataclass
class TokenizerTrainConfig:
    """Everything that `mmwudao train tokenizer` reads from its YAML file."""

    data: TokenizerDataConfig = field(default_factory=TokenizerDataConfig)
    model: VQVAEConfig = field(default_factory=VQVAEConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    commitment: float = 0.25  # beta of van den Oord et al. 2017, eq. 3
    pixel_weight: float = 16.0  # on the squared error of pixels in [0, 1], whose variance is about 1/16


@dataclass
class ReconstructionFigures:
    """`psnr` in dB, the mean over pictures; `usage` the share of codes in use; `perplexity` of the code histogram."""

    psnr: float
    usage: float
    perplexity: float


def train(config: TokenizerTrainConfig, resume: bool = False) -> Path:
    """Train the tokenizer and save its averaged weights; returns their folder, `out`/tokenizer.

    Raises `ValueError` for settings that do not fit the data.
    """
    if config.data.image_size % config.model.stride:
        raise ValueError(
            f"data.image_size={config.data.image_size} is not a multiple of the stride {config.model.stride} "
            "(2 ** the number of model.channels)"
        )
    return train_model(config.loop, lambda device: _task(config, device), resume)


def _task(config: TokenizerTrainConfig, device: torch.device) -> Task:
    pictures = read_training_pictures(config.data, config.data.test, by_node=False)
    test, _ = _stacked(islice(pictures, config.data.test_pictures), config.data)
    batches = (InMemoryBatches if config.data.in_memory else StreamedBatches)(config)
    model = VQVAE(config.model).to(memory_format=torch.channels_last)
    if config.loop.compile:
        for side in (model.encoder, model.decoder):
            side.compile()

    def loss_of(wrapped: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        restored: Reconstruction = wrapped(pixels.to(device).float() / 255)
        loss = config.pixel_weight * restored.pixel_loss + config.commitment * restored.commitment
        return {"loss": loss, "pixel_loss": restored.pixel_loss, "commitment": restored.commitment}

    def evaluate(averaged: nn.Module, step: int) -> dict[str, float]:
        figures, sheet = measure_reconstruction(averaged, test, device)
        if rank() == 0:
            sheet_path = Path(config.loop.out) / "sheets" / f"{step:06d}.png"
            sheet_path.parent.mkdir(parents=True, exist_ok=True)
            _image(sheet).save(sheet_path)
        return vars(figures)

    return Task(model, batches, loss_of, evaluate, "tokenizer", save_part)


def read_training_pictures(data: TokenizerDataConfig, split: str, **options: Any) -> Iterator[tuple[Tensor, str]]:
    """The uint8 pictures [3, S, S] of a split, with their ids."""
    import numpy

    for sample, image in open_shards(data.shards, split, **options):
        if sample.family not in data.exclude_families:
            square = to_square(image, data.image_size)
            yield torch.from_numpy(numpy.array(square)).permute(2, 0, 1).contiguous(), sample.id


@torch.no_grad()
def measure_reconstruction(
    model: nn.Module, pictures: Tensor, device: torch.device, batch_size: int = 64
) -> tuple[ReconstructionFigures, Tensor]:
    """Figures over uint8 `pictures` [N, 3, S, S], and a sheet uint8 [3, 2S, 8S]: eight pictures over their copies."""
    values, histograms = [], []
    rows: list[Tensor] = []
    for start in range(0, len(pictures), batch_size):
        pixels = pictures[start : start + batch_size].to(device).float() / 255
        restored: Reconstruction = model(pixels)
        images = restored.images.clamp(0, 1)
        values.append(psnr(images, pixels))
        histograms.append(torch.bincount(restored.codes.flatten(), minlength=model.config.codebook_size))  # type: ignore[union-attr,arg-type]
        if not rows:
            rows = [torch.cat(list(part[:8]), dim=2) for part in (pixels, images)]
    counts = torch.stack(histograms).sum(dim=0).double()
    shares = counts / counts.sum()
    figures = ReconstructionFigures(
        psnr=float(torch.cat(values).mean()),
        usage=float((counts > 0).double().mean()),
        perplexity=float(torch.exp(-(shares * shares.clamp_min(1e-12).log()).sum())),
    )
    return figures, (torch.cat(rows, dim=1) * 255).round().to(torch.uint8).cpu()


class InMemoryBatches:
    """Random batches of pictures held as uint8; (seed, step) decides the draw, whatever the number of processes."""

    def __init__(self, config: TokenizerTrainConfig) -> None:
        self.config = config.loop
        pictures = read_training_pictures(config.data, config.data.train, by_node=False)
        self.pictures, self.ids = _stacked(pictures, config.data)

    def __call__(self, step: int) -> Iterator[tuple[Tensor, list[str]]]:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        drawn = torch.randint(len(self.pictures), (self.config.batch_size,), generator=generator)
        for part in drawn[rank() :: world_size()].chunk(self.config.accumulate):
            yield self.pictures[part], [self.ids[index] for index in part.tolist()]


class StreamedBatches:
    """Batches from shards read with replacement, for data of any size.

    After a resume the stream starts anew at the seed of that step: another order, never the same start again.
    """

    def __init__(self, config: TokenizerTrainConfig) -> None:
        self.data, self.config = config.data, config.loop
        self.stream: Iterator[tuple[Tensor, str]] | None = None

    def __call__(self, step: int) -> Iterator[tuple[Tensor, list[str]]]:
        if self.stream is None:
            seed = self.config.seed * 1_000_003 + step
            self.stream = read_training_pictures(
                self.data, self.data.train, shuffle=self.data.shuffle, seed=seed, resampled=True
            )
        size = self.config.batch_size // (self.config.accumulate * world_size())
        for _ in range(self.config.accumulate):
            yield _stacked(islice(self.stream, size), self.data)


def _stacked(pictures: Iterator[tuple[Tensor, str]], data: TokenizerDataConfig) -> tuple[Tensor, list[str]]:
    """uint8 [N, 3, S, S], and the N ids."""
    found = list(pictures)
    if not found:
        raise DataError(f"{data.shards} holds no readable pictures of the chosen families and splits")
    return torch.stack([pixels for pixels, _ in found]), [name for _, name in found]


def _image(pixels: Tensor) -> Any:
    from torchvision.transforms.functional import to_pil_image

    return to_pil_image(pixels)
