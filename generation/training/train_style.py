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
from generation.rows.base import TextEncoder
from generation.rows.row import RowBatch
from generation.rows.texts import CaptionMix
from generation.training.batches import RowBatches, RowMaker, held_out_batches, mean_bits
from generation.training.config import GeneratorDataConfig, GeneratorTrainConfig
from generation.training.pairs import CodedPairs
from generation.training.train_generator import LossModule
from generation.transformer.adapters import AdapterOptions, make_trainable, save_adapter
from generation.transformer.model import Transformer
from vqvae.training.config import LoopConfig
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
    balance: float = 0.5  # see CodedPairs.sampling_weights
    test_pictures: int = 256  # of each test split
    captions: CaptionMix = field(default_factory=lambda: CaptionMix(style=0.0))
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        if self.captions.style:
            raise ValueError("captions.style must be 0: the adapter is the style")


@dataclass
class StyleBase:
    """The model (float32) that an adapter is trained on, its text tokenizer, and its content hash."""

    model: Transformer
    text: TextEncoder
    content_hash: str


class PromptedText:
    """A text tokenizer that puts the prompt vectors before every caption."""

    def __init__(self, text: TextEncoder, prompt_pieces: list[int]) -> None:
        self.text, self.prompt_pieces = text, prompt_pieces

    def encode(self, text: str) -> list[int]:
        """Raw text pieces, those of the prompt first."""
        return [*self.prompt_pieces, *self.text.encode(text)]


def style_batches(config: StyleTrainConfig, model: Transformer, text: TextEncoder) -> dict[str, list[RowBatch]]:
    """The family's held-out pictures by split, with captions that do not name it, in the format of `model`.

    Raises `ConfigError` when the codes are of another image tokenizer or size, `DataError` for an unknown family.
    """
    folder = Path(config.codes)
    if tokenizer_hash(folder) != model.config.tokenizer_hash:
        raise ConfigError(f"codes={folder} were made by another image tokenizer than the one of {config.base}")
    maker = _row_maker(config, model, text)
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
    return train_model(config.loop, lambda device: _task(config, base, device), resume)


def _task(config: StyleTrainConfig, start: StyleBase, device: torch.device) -> Task:
    base, text = start.model, start.text
    base.to(device).eval()
    pairs = CodedPairs(Path(config.codes), config.train, family=config.family)
    with torch.no_grad():
        before = {
            split: mean_bits(base, batches, device)["image_bits"]
            for split, batches in style_batches(config, base, text).items()
        }
    trained_count = make_trainable(base, config.adapter)
    print_once(f"{len(pairs)} pictures, {trained_count:,} parameters to train")
    if config.loop.compile:
        for block in base.blocks:
            block.compile(dynamic=True)
    held_out = style_batches(config, base, text)
    batches = RowBatches(pairs, _row_maker(config, base, text))

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

    return Task(LossModule(base), batches, loss_of, evaluate, "adapter", save)


def _row_maker(config: StyleTrainConfig, model: Transformer, text: TextEncoder) -> RowMaker:
    """Rows that draw, in the format of `model`. Text has no weight: only the picture is learned."""
    captions = config.captions
    if config.adapter.method == "ptuning":
        captions = replace(captions, dropout=0.0)  # rows without a prompt hold nothing that could be trained
    settings = GeneratorTrainConfig(
        data=GeneratorDataConfig(balance=config.balance, test_pictures=config.test_pictures),
        captions=captions,
        loop=config.loop,
        text_weight=0.0,
    )
    return RowMaker(PromptedText(text, model.config.vocabulary.prompt_pieces), model.config, settings)
