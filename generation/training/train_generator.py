"""Train the generator: `mmwudao train generator CONFIG`.

Reads shards of codes (`mmwudao tokenize`), trains the transformer with the shared loop, and logs the bits per image
token on held-out splits and sheets of sample pictures. Under torchrun, every process takes its part of each batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.codes import tokenizer_hash
from data.config import ConfigError
from data.text import TextTokenizer
from generation.drawing.decoding import generate_codes
from generation.drawing.sampling import SamplingOptions
from generation.rows.mixture import Mixture
from generation.rows.row import RowBatch
from generation.training.batches import RowBatches, RowMaker, held_out_batches, mean_bits
from generation.training.config import GeneratorDataConfig, GeneratorTrainConfig
from generation.training.pairs import CodedPairs, unigram_bits
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from vqvae.model import VQVAE
from vqvae.storage.parts import content_hash, load_part, save_part
from vqvae.training.loop import train_model
from vqvae.training.process import distributed, rank, world_size
from vqvae.training.task import Task


class LossModule(nn.Module):
    """The model with its loss as `forward`, which is what DDP and torch.compile wrap."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: RowBatch, total: Tensor) -> dict[str, Tensor]:
        """The losses of `batch`; `total` is the mean sum of weights of this process's micro-batches."""
        if distributed():
            # DDP averages gradients: dividing by the mean weight of all processes gives those of one large batch
            total = total.clone()
            dist.all_reduce(total)
            total = total / world_size()
        return self.model.loss(batch, total)


def train(config: GeneratorTrainConfig, resume: bool = False) -> Path:
    """Train the generator and save its averaged weights; returns their folder, `out`/generator.

    Raises `ValueError` for settings that do not fit the data.
    """
    return train_model(config.loop, lambda device: _task(config, device), resume)


def _task(config: GeneratorTrainConfig, device: torch.device) -> Task:
    text = TextTokenizer(Path(config.data.text_model))
    pairs = CodedPairs(Path(config.data.codes), config.data.train, config.data.exclude_families)
    tokenizer = _sheet_tokenizer(config.data, tokenizer_hash(Path(config.data.codes)))
    model_config = _model_config(config, text, pairs, tokenizer)
    model = _start(config.start_from, model_config)
    if config.checkpoint_gradients:
        model.checkpoint_gradients()
    if config.loop.compile:
        for block in model.blocks:
            block.compile(dynamic=True)  # rows differ in length from batch to batch
    maker = RowMaker(text, model_config, config)
    batches = RowBatches(pairs, maker)
    tests = _held_out_splits(pairs, maker)

    def loss_of(wrapped: nn.Module, micro_batch: tuple[RowBatch, Tensor]) -> dict[str, Tensor]:
        batch, total = micro_batch
        losses = wrapped(batch.to(device), total.to(device))
        if batch.segments is not None:
            return {"loss": losses["loss"], "caption_bits": losses["text_bits"]}
        return losses

    def evaluate(averaged: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(averaged, LossModule)
        figures: dict[str, float] = {}
        for test in tests:
            figures |= test.figures(averaged.model, device)
        if rank() == 0 and tokenizer is not None and config.sample_prompts and step % config.sample_every == 0:
            _write_sheet(averaged.model, tokenizer, text, config, step)
        return figures

    def save(averaged: nn.Module, folder: Path) -> None:
        assert isinstance(averaged, LossModule)
        save_part(averaged.model, folder)

    return Task(LossModule(model), batches, loss_of, evaluate, "generator", save)


@dataclass(frozen=True)
class HeldOutSplit:
    """Batches of one held-out split, and its bits per image token under the code frequencies of the training split."""

    name: str
    draw: list[RowBatch]
    describe: list[RowBatch]  # empty where the generator does not learn to describe
    unigram_bits: float

    def figures(self, model: Transformer, device: torch.device) -> dict[str, float]:
        """What the log says of `model` on this split."""
        found = mean_bits(model, self.draw, device)
        if self.describe:
            found["caption_bits"] = mean_bits(model, self.describe, device)["text_bits"]
        found["unigram_bits"] = self.unigram_bits
        return {f"{self.name}/{name}": value for name, value in found.items()}


def _held_out_splits(train_pairs: CodedPairs, maker: RowMaker) -> list[HeldOutSplit]:
    data, describes = maker.config.data, "describe" in Mixture(maker.config.mix).shares
    splits = []
    for name in data.test:
        pairs = CodedPairs(Path(data.codes), name, data.exclude_families)
        draw = held_out_batches(pairs, maker)
        describe = held_out_batches(pairs, maker, "describe") if describes else []
        splits.append(HeldOutSplit(name, draw, describe, unigram_bits(train_pairs, pairs, maker.model.num_image_codes)))
    return splits


def _model_config(
    config: GeneratorTrainConfig, text: TextTokenizer, pairs: CodedPairs, tokenizer: VQVAE | None
) -> TransformerConfig:
    """`config.model` with the sizes and hashes of the data. Raises `ConfigError` for codes outside its vocabulary."""
    folder = Path(config.data.codes)
    completed = replace(
        config.model,
        num_image_codes=tokenizer.config.codebook_size if tokenizer else config.model.num_image_codes,
        num_text_pieces=text.vocab_size,
        grid=pairs.grid,
        tokenizer_hash=tokenizer_hash(folder),
        text_hash=text.content_hash,
    )
    if int(pairs.codes.max()) >= completed.num_image_codes:
        raise ConfigError(f"model.num_image_codes={completed.num_image_codes}, but {folder} holds larger codes")
    return completed


def _start(folder: str, config: TransformerConfig) -> Transformer:
    """A new model, with the weights of the trained one in `folder` if there is one."""
    model = Transformer(config)
    if folder:
        trained = load_part(Transformer, folder)
        if trained.config != config:
            raise ConfigError(f"start_from={folder} is a generator of another configuration or of other parts")
        model.load_state_dict(trained.state_dict())
    return model


def _sheet_tokenizer(data: GeneratorDataConfig, expected: str) -> VQVAE | None:
    if not data.tokenizer:
        return None
    tokenizer = load_part(VQVAE, data.tokenizer)
    if content_hash(tokenizer) != expected:
        raise ConfigError(f"data.tokenizer={data.tokenizer} is not the tokenizer that made the codes in {data.codes}")
    return tokenizer


def _write_sheet(
    model: Transformer, tokenizer: VQVAE, text: TextTokenizer, config: GeneratorTrainConfig, step: int
) -> None:
    from torchvision.utils import save_image

    prompts = [text.encode(prompt) for prompt in config.sample_prompts]
    options = SamplingOptions(guidance=2.0, top_k=100)
    codes = generate_codes(model, prompts, list(range(len(prompts))), options, grid=model.config.grid)
    path = Path(config.loop.out) / "sheets" / f"{step:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(tokenizer.decode(codes.cpu()), path, nrow=8)
