"""Learn a style: `mmwudao train style CONFIG`.

Trains an adapter (`generation.transformer.adapters`) on the pictures of one family, with captions that never name it:
the adapter is the style. Logs the bits per image token on the family's held-out pictures, with the adapter and without.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data.codes import tokenizer_hash
from data.config import ConfigError
from data.options import COUNT, check_options, option
from generation.rows.base import PieceEncoder
from generation.rows.prompt import FeatureSource
from generation.rows.row import RowBatch
from generation.rows.texts import CaptionMix
from generation.training.batches import RowBatches, RowMaker, held_out_batches, mean_bits
from generation.training.config import GeneratorDataConfig, GeneratorTrainConfig
from generation.training.pairs import CodedPairs
from generation.training.train_generator import LossModule
from generation.transformer.adapters import AdapterOptions, make_trainable, save_adapter
from generation.transformer.model import Transformer
from vqvae.training.config import LoopConfig, ParallelConfig
from vqvae.training.loop import train_model
from vqvae.training.process import print_once
from vqvae.training.task import Task


@dataclass
class StyleTrainConfig:
    """Everything that `mmwudao train style` reads from its YAML file."""

    base: str = "emoji"  # the model: a shipped name, a folder or a hub id
    codes: str = "codes"  # folder written by `mmwudao tokenize` with the base's image tokenizer
    family: str = "fxemoji"
    train: str = "train"
    test: list[str] = field(default_factory=lambda: ["test-family", "test-concept"])
    balance: float = option(
        0.5, "A picture's weight is the count of its concept's and family's pictures to the power of minus this.",
        least=0, most=10,
    )  # fmt: skip
    test_pictures: int = option(256, "Evaluate on this many pictures of each test split.", least=1, most=COUNT)
    captions: CaptionMix = field(default_factory=lambda: CaptionMix(style=0.0))
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        check_options(self)
        if self.captions.style:
            raise ValueError("captions.style must be 0: the adapter is the style")


@dataclass
class StyleBase:
    """The model (float32) that an adapter is trained on, its text tokenizer, and its content hash.

    `features` gives the vectors of prompts, if the model reads them.
    """

    model: Transformer
    text: PieceEncoder
    content_hash: str
    features: FeatureSource | None = None


class PromptedText:
    """A text tokenizer that puts the prompt vectors before every caption."""

    def __init__(self, text: PieceEncoder, prompt_pieces: list[int]) -> None:
        self.text, self.prompt_pieces = text, prompt_pieces

    def encode(self, text: str) -> list[int]:
        """Raw text pieces, those of the prompt first."""
        return [*self.prompt_pieces, *self.text.encode(text)]


def style_batches(config: StyleTrainConfig, base: StyleBase) -> dict[str, list[RowBatch]]:
    """The family's held-out pictures by split, with captions that do not name it, in the format of the model of `base`.

    Raises `ConfigError` when the codes are of another image tokenizer or size, `DataError` for an unknown family.
    """
    folder, model = Path(config.codes), base.model
    if tokenizer_hash(folder) != model.config.tokenizer_hash:
        raise ConfigError(f"codes={folder} were made by another image tokenizer than the one of {config.base}")
    maker = _row_maker(config, base)
    batches = {}
    for split in config.test:
        pairs = CodedPairs(folder, split, family=config.family)
        if pairs.grid[0] > model.config.grid[0] or pairs.grid[1] > model.config.grid[1]:
            raise ConfigError(f"codes={folder} are {pairs.grid} a picture, {config.base} draws {model.config.grid}")
        batches[split] = held_out_batches(pairs, maker, named_style=False)
    return batches


def train(config: StyleTrainConfig, base: StyleBase, resume: bool = False) -> Path:
    """Train an adapter on `base` and save its averaged weights; returns the adapter's folder, `out`/adapter.

    The model of `base` is changed: it holds the trained adapter afterwards.

    Raises `ValueError` for settings that do not fit the data or the base.
    """
    return train_model(config.loop, lambda device: _task(config, base, device), resume, config.parallel)


def _task(config: StyleTrainConfig, start: StyleBase, device: torch.device) -> Task:
    base = start.model
    base.to(device).eval()
    pairs = CodedPairs(Path(config.codes), config.train, family=config.family)
    with torch.no_grad():
        before = {
            split: mean_bits(base, batches, device)["image_bits"]
            for split, batches in style_batches(config, start).items()
        }
    trained_count = make_trainable(base, config.adapter)
    print_once(f"{len(pairs)} pictures, {trained_count:,} parameters to train")
    if config.loop.compile:
        for block in base.blocks:
            block.compile(dynamic=True)
    held_out = style_batches(config, start)
    batches = RowBatches(pairs, _row_maker(config, start))

    origin = {
        "model (base)": start.content_hash,
        "image tokenizer (codes)": tokenizer_hash(Path(config.codes)),
        "family": config.family,
        "method (adapter.method)": config.adapter.method,
    }

    def loss_of(wrapped: nn.Module, micro_batch: tuple[RowBatch, Tensor]) -> dict[str, Tensor]:
        batch, total = micro_batch
        losses = wrapped(batch.to(device), total.to(device))
        return {name: losses[name] for name in ("loss", "image_bits")}

    def evaluate(averaged: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(averaged, LossModule)
        figures: dict[str, float] = {}
        for split, test in held_out.items():
            figures[f"{split}/image_bits"] = mean_bits(averaged.model, test, device)["image_bits"]
            figures[f"{split}/base_bits"] = before[split]
        return figures

    def save(averaged: nn.Module, folder: Path) -> None:
        assert isinstance(averaged, LossModule)
        save_adapter(averaged.model, folder, config.family, config.adapter, start.content_hash)

    return Task(LossModule(base), batches, loss_of, evaluate, "adapter", save, origin=origin)


def _row_maker(config: StyleTrainConfig, base: StyleBase) -> RowMaker:
    """Rows that draw, in the format of the model of `base`. Text has no weight: only the picture is learned."""
    captions = config.captions
    if config.adapter.method == "ptuning":
        captions = replace(captions, dropout=0.0)  # rows without a prompt hold nothing that could be trained
    settings = GeneratorTrainConfig(
        data=GeneratorDataConfig(balance=config.balance, test_pictures=config.test_pictures),
        captions=captions,
        loop=config.loop,
        text_weight=0.0,
    )
    model = base.model.config
    return RowMaker(PromptedText(base.text, model.vocabulary.prompt_pieces), model, settings, base.features)
