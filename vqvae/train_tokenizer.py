"""Train the image tokenizer: `mmwudao train tokenizer CONFIG`.

Reads shards, trains the VQ-VAE with the shared loop, and logs PSNR, code usage and perplexity on a held-out split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor, nn

from data.images import to_square
from data.options import COUNT, SIDE, check_options, option
from data.reading import expand_shards, open_shards
from data.sample import DataError
from data.shard_index import ShuffledShards
from vqvae.model import VQVAE, Reconstruction, VQVAEConfig
from vqvae.psnr import psnr
from vqvae.storage.parts import ModelError, load_part, save_part
from vqvae.tokenizer_loss import ReconstructionLossConfig, TokenizerLoss
from vqvae.training.config import LoopConfig, ParallelConfig
from vqvae.training.loop import train_model
from vqvae.training.process import print_once, rank, replica, replicas
from vqvae.training.task import Task


@dataclass
class TokenizerDataConfig:
    """Which pictures: a folder of shards (or a pattern) and the splits to train and test on."""

    shards: str = "shards"
    train: str = "train"
    test: str = "test-concept"
    exclude_families: list[str] = field(default_factory=list)
    image_size: int = option(
        128, "Pictures are resized and cropped to a square of this many pixels.", least=8, most=SIDE
    )
    test_pictures: int = option(512, "Evaluate on this many pictures of the test split.", least=1, most=COUNT)
    # decode every training picture once and keep it as uint8; else shards are streamed (any number of pictures)
    in_memory: bool = False
    shuffle: int = option(
        2000, "Pictures that are shuffled together when streaming; whole shards.", least=0, most=COUNT
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class TokenizerTrainConfig(ReconstructionLossConfig):
    """Everything that `mmwudao train tokenizer` reads from its YAML file: weights of the loss, and three sections."""

    data: TokenizerDataConfig = field(default_factory=TokenizerDataConfig)
    model: VQVAEConfig = field(default_factory=VQVAEConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    # the folder of a trained tokenizer, of whose weights those of the same name and shape are the start
    init: str = ""

    def __post_init__(self) -> None:
        check_options(self)


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
    return train_model(config.loop, lambda device: _task(config, device), resume, config.parallel)


def _task(config: TokenizerTrainConfig, device: torch.device) -> Task:
    pictures = read_training_pictures(config.data, config.data.test, by_node=False)
    test, _ = _stacked(islice(pictures, config.data.test_pictures), config.data)
    batches = (InMemoryBatches if config.data.in_memory else StreamedBatches)(config)
    model = VQVAE(config.model)
    if config.init:
        start_from(model, load_part(VQVAE, config.init))
    model = model.to(memory_format=torch.channels_last)
    if config.loop.compile:
        for side in (model.encoder, model.decoder):
            side.compile()

    loss = TokenizerLoss(config, model.decoder.project.weight, device)

    def batches_of(step: int) -> Iterator[tuple[Tensor, list[str]]]:
        loss.step = step
        return batches(step)

    def loss_of(wrapped: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        originals = pixels.to(device).float() / 255
        return loss(wrapped(originals), originals)

    def evaluate(averaged: nn.Module, step: int) -> dict[str, float]:
        figures, sheet = measure_reconstruction(averaged, test, device)
        if rank() == 0:
            sheet_path = Path(config.loop.out) / "sheets" / f"{step:06d}.png"
            sheet_path.parent.mkdir(parents=True, exist_ok=True)
            _image(sheet).save(sheet_path)
        return vars(figures)

    origin: dict[str, str] = {"nearest code (model.lookup)": config.model.lookup}
    adapts = config.adversarial.weight > 0 and config.adversarial.adaptive
    return Task(
        model, batches_of, loss_of, evaluate, "tokenizer", save_part, loss.opponent, origin=origin,
        unshardable="adversarial.adaptive needs the last layer whole; set it to false, or shard=1" if adapts else "",
    )  # fmt: skip


def start_from(model: VQVAE, trained: VQVAE) -> list[str]:
    """Copy the weights of `trained` whose names and shapes `model` has too; returns their names.

    A codebook is copied with its counts, or not at all. Raises `ModelError` if nothing of the encoder fits.
    """
    own = model.state_dict()
    found = trained.state_dict()
    fitting = {name: found[name] for name in own if name in found and found[name].shape == own[name].shape}
    if "quantizer.codebook" not in fitting:
        fitting = {name: tensor for name, tensor in fitting.items() if not name.startswith("quantizer.")}
    if not any(name.startswith("encoder.") for name in fitting):
        raise ModelError("init: no weight of that tokenizer's encoder has the shape of this model's")
    model.load_state_dict(own | fitting)
    print_once(f"starts from {len(fitting)} of {len(own)} trained tensors")
    return sorted(fitting)


def read_training_pictures(data: TokenizerDataConfig, split: str, **options: Any) -> Iterator[tuple[Tensor, str]]:
    """The uint8 pictures [3, S, S] of a split, with their ids."""
    for sample, image in open_shards(data.shards, split, captions=False, **options):
        if sample.family not in data.exclude_families:
            yield _pixels(image, data), sample.id


def _pixels(image: Image.Image, data: TokenizerDataConfig) -> Tensor:
    """uint8 [3, S, S]."""
    return torch.from_numpy(numpy.array(to_square(image, data.image_size))).permute(2, 0, 1).contiguous()


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
        for part in drawn[replica() :: replicas()].chunk(self.config.accumulate):
            yield self.pictures[part], [self.ids[index] for index in part.tolist()]


class StreamedBatches:
    """Batches of pictures read from shards, for data of any size, each picture once an epoch.

    (seed, step) decides which, whatever the number of processes (`data.shard_index`).
    """

    def __init__(self, config: TokenizerTrainConfig) -> None:
        self.data, self.config = config.data, config.loop
        self.pictures = ShuffledShards(
            expand_shards(config.data.shards, config.data.train), shuffle=config.data.shuffle, seed=config.loop.seed,
            captions=False, exclude_families=config.data.exclude_families,
        )  # fmt: skip

    def __call__(self, step: int) -> Iterator[tuple[Tensor, list[str]]]:
        first, count = step * self.config.batch_size, self.config.batch_size
        own = range(first, first + count)[replica() :: replicas()]
        size = len(own) // self.config.accumulate
        for start in range(0, len(own), size):
            examples = [self.pictures.at(position) for position in own[start : start + size]]
            yield _stacked(((_pixels(image, self.data), sample.id) for sample, image in examples), self.data)


def _stacked(pictures: Iterator[tuple[Tensor, str]], data: TokenizerDataConfig) -> tuple[Tensor, list[str]]:
    """uint8 [N, 3, S, S], and the N ids."""
    found = list(pictures)
    if not found:
        raise DataError(f"{data.shards} holds no readable pictures of the chosen families and splits")
    return torch.stack([pixels for pixels, _ in found]), [name for _, name in found]


def _image(pixels: Tensor) -> Any:
    from torchvision.transforms.functional import to_pil_image

    return to_pil_image(pixels)
