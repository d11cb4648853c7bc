"""Train the generator: `mmwudao train generator CONFIG`.

Reads shards of codes (`mmwudao tokenize`), trains the transformer with the shared loop, and logs the bits per image
token on held-out splits and sheets of sample pictures. Under torchrun, every process takes its part of each batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.codes import tokenizer_hash
from data.config import ConfigError, load_config
from data.text import TextTokenizer
from generation.drawing.decoding import generate_codes
from generation.drawing.sampling import SamplingOptions
from generation.rows.describe import caption_row
from generation.rows.draw import training_row
from generation.rows.noise import noisy_codes, with_noise
from generation.rows.row import Row, RowBatch, collate, pack
from generation.training.pairs import CaptionConfig, CodedPairs, descriptions, draw_caption, unigram_bits
from generation.transformer.model import Transformer, TransformerConfig
from vqvae.model import VQVAE
from vqvae.storage.parts import content_hash, load_part, save_part
from vqvae.training.loop import Loop, LoopConfig, distributed, rank, setup_device, world_size


@dataclass
class GeneratorDataConfig:
    """Which codes and captions."""

    codes: str = "codes"  # folder written by `mmwudao tokenize`
    text_model: str = "text.model"  # SentencePiece
    tokenizer: str = ""  # folder of the image tokenizer, for sample sheets; empty = no sheets
    train: str = "train"
    test: list[str] = field(default_factory=lambda: ["test-family", "test-concept"])
    exclude_families: list[str] = field(default_factory=list)
    balance: float = 0.5  # see CodedPairs.sampling_weights
    test_pictures: int = 256  # of each test split


@dataclass
class GeneratorTrainConfig:
    """Everything that `mmwudao train generator` reads from its YAML file.

    Of `model`, the vocabulary sizes, the grid and the hashes are filled in from the data.
    """

    data: GeneratorDataConfig = field(default_factory=GeneratorDataConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    model: TransformerConfig = field(default_factory=TransformerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    start_from: str = ""  # folder of a trained generator of the same sizes; empty = random weights
    text_weight: float = 0.2  # of a text token's loss in rows that draw, next to 1 of an image token's
    code_noise: float = 0.0  # up to that share of a row's codes is swapped for wrong ones, see `rows.noise`
    code_mask: float = 0.0  # share of the rows that draw whose given codes are hidden, half of them to all
    given_codes: float = 1.0  # each step that describes gives between that share of the codes and all of them
    packing: bool = True  # rows behind one another, not padded to the longest; padded if attention is sparse
    checkpoint_gradients: bool = False  # less memory, a third more time
    sample_prompts: list[str] = field(default_factory=list)
    sample_every: int = 2000  # steps between sample sheets


def main(config: Path | None, overrides: list[str], resume: bool = False) -> Path:
    """Train as `config` says; returns the folder of the saved generator (`out`/generator)."""
    return train(load_config(GeneratorTrainConfig, config, overrides), resume)


class LossModule(nn.Module):
    """The model with its loss as `forward`, which is what DDP and torch.compile wrap."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: RowBatch, total: Tensor) -> dict[str, Tensor]:
        """`total`: the mean sum of weights of this process's micro-batches of the step."""
        if distributed():
            # DDP averages gradients: dividing by the mean weight of all processes gives those of one large batch
            total = total.clone()
            dist.all_reduce(total)
            total = total / world_size()
        return self.model.loss(batch, total)


def train(config: GeneratorTrainConfig, resume: bool = False) -> Path:
    """Train the generator and save its averaged weights. `ValueError` for settings that do not fit the data."""
    torch.manual_seed(config.loop.seed)
    device = setup_device(config.loop.device)
    text = TextTokenizer(Path(config.data.text_model))
    folder = Path(config.data.codes)
    pairs = CodedPairs(folder, config.data.train, config.data.exclude_families)
    tests = {split: CodedPairs(folder, split, config.data.exclude_families) for split in config.data.test}
    tokenizer = _sheet_tokenizer(config.data, tokenizer_hash(folder))
    model_config = replace(
        config.model,
        num_image_codes=tokenizer.config.codebook_size if tokenizer else config.model.num_image_codes,
        num_text_pieces=text.vocab_size,
        grid=pairs.grid,
        tokenizer_hash=tokenizer_hash(folder),
        text_hash=text.content_hash,
    )
    if int(pairs.codes.max()) >= model_config.num_image_codes:
        raise ConfigError(f"model.num_image_codes={model_config.num_image_codes}, but {folder} holds larger codes")
    model = _start(config.start_from, model_config)
    if config.checkpoint_gradients:
        model.checkpoint_gradients()
    if config.loop.compile:
        for block in model.blocks:
            block.compile(dynamic=True)  # rows differ in length from batch to batch
    batches = PairBatches(pairs, text, model_config, config)
    test_batches = {split: held_out_batches(test, text, model_config, config) for split, test in tests.items()}
    test_captions = {}
    if config.captions.image_first:
        test_captions = {
            split: held_out_batches(test, text, model_config, config, image_first=True) for split, test in tests.items()
        }
    baselines = {split: unigram_bits(pairs, test, model_config.num_image_codes) for split, test in tests.items()}

    def loss_of(wrapped: nn.Module, micro_batch: tuple[RowBatch, Tensor]) -> dict[str, Tensor]:
        batch, total = micro_batch
        losses = wrapped(batch.to(device), total.to(device))
        if batch.segments is not None:
            return {"loss": losses["loss"], "caption_bits": losses["text_bits"]}
        return losses

    def evaluate(averaged: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(averaged, LossModule)
        figures: dict[str, float] = {}
        for split, held_out in test_batches.items():
            figures |= {f"{split}/{name}": value for name, value in mean_bits(averaged.model, held_out, device).items()}
            if split in test_captions:
                described = mean_bits(averaged.model, test_captions[split], device)
                figures[f"{split}/caption_bits"] = described["text_bits"]
            figures[f"{split}/unigram_bits"] = baselines[split]
        if rank() == 0 and tokenizer is not None and config.sample_prompts and step % config.sample_every == 0:
            _write_sheet(averaged.model, tokenizer, text, config, step)
        return figures

    loop = Loop(config.loop, LossModule(model), batches, loss_of, evaluate, device)
    trained = loop.run(resume)
    assert isinstance(trained, LossModule)
    out = Path(config.loop.out) / "generator"
    if rank() == 0:
        save_part(trained.model, out)
    if distributed():
        dist.destroy_process_group()
    return out


class CaptionEncoder(Protocol):
    """Captions to raw text pieces: `TextTokenizer`, or one that puts prompt vectors in front."""

    def encode(self, text: str) -> list[int]: ...


class PairBatches:
    """Random training batches; (seed, step) decides the draw, whatever the number of processes."""

    def __init__(
        self, pairs: CodedPairs, text: CaptionEncoder, model: TransformerConfig, config: GeneratorTrainConfig
    ) -> None:
        self.pairs, self.text, self.model, self.config = pairs, text, model, config
        self.weights = pairs.sampling_weights(config.data.balance)
        parts = config.loop.accumulate * world_size()
        if config.loop.batch_size % parts:
            raise ConfigError(
                f"loop.batch_size={config.loop.batch_size} is not a multiple of accumulate x processes = {parts}"
            )

    def __call__(self, step: int) -> Iterator[tuple[tuple[RowBatch, Tensor], list[str]]]:
        loop = self.config.loop
        seed = loop.seed * 1_000_003 + step
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(self.weights, loop.batch_size, replacement=True, generator=generator).tolist()
        # all rows of a step draw, or all describe: rows of one kind are of like length, and those that draw are causal
        kind = random.Random(f"{seed}")
        describes = kind.random() < self.config.captions.image_first
        given = kind.uniform(self.config.given_codes, 1.0)
        # one caption per place in the batch, so that each process draws the same one
        rows = list(enumerate(drawn))
        size = loop.batch_size // loop.accumulate
        batches, ids = [], []
        for start in range(0, loop.batch_size, size):
            part = rows[start : start + size][rank() :: world_size()]
            built = []
            for place, index in part:
                rng = random.Random(f"{seed} {place}")
                built.append(self._describing_row(index, given, rng) if describes else self._drawing_row(index, rng))
            together = pack if self.config.packing and not self.model.sparse_window else collate
            batches.append(together(self.model.vocabulary, built, self.config.text_weight))
            ids.append([self.pairs.samples[index].id for _, index in part])
        # of all micro-batches: with a divisor each, a caption's weight would depend on which others it lies with
        total = torch.stack([batch.weights.sum() for batch in batches]).mean()
        yield from zip([(batch, total) for batch in batches], ids, strict=True)

    def _drawing_row(self, index: int, rng: random.Random) -> Row:
        config = self.config
        caption = draw_caption(self.pairs.samples[index], config.captions, rng)
        row = _row(self.pairs, index, caption, self.text, self.model)
        if not (config.code_noise or config.code_mask):
            return row
        if rng.random() < config.code_mask:
            # what cannot be continued must be read off the text
            other, share = torch.full(self.pairs.grid, self.model.vocabulary.command("[MASK]")), rng.uniform(0.5, 1)
        else:
            other, share = self._other_codes(rng), rng.uniform(0, config.code_noise)
        return with_noise(row, other, share, torch.Generator().manual_seed(rng.getrandbits(63)))

    def _describing_row(self, index: int, given: float, rng: random.Random) -> Row:
        """The picture with its name in every language, each for itself: all that it can teach about its text."""
        model, (height, width) = self.model, self.pairs.grid
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        share = rng.uniform(0, self.config.code_noise)
        codes = noisy_codes(self.pairs.codes[index], self._other_codes(rng), share, generator)
        kept = torch.zeros(height * width, dtype=torch.bool)
        kept[torch.randperm(len(kept), generator=generator)[: max(1, round(given * len(kept)))]] = True
        texts = [self.text.encode(caption) for caption in descriptions(self.pairs.samples[index])]
        grid_kept = kept.view(height, width)
        return caption_row(model.vocabulary, texts, codes, model.max_text, model.position_kind, grid_kept)

    def _other_codes(self, rng: random.Random) -> Tensor:
        return self.pairs.codes[rng.randrange(len(self.pairs))]


def held_out_batches(
    pairs: CodedPairs,
    text: CaptionEncoder,
    model: TransformerConfig,
    config: GeneratorTrainConfig,
    image_first: bool = False,
    named_style: bool = True,
) -> list[RowBatch]:
    """Fixed batches of `test_pictures` pictures spread over the split, each with its name in a fixed language."""
    count = min(len(pairs), config.data.test_pictures)
    captions = CaptionConfig(name=1.0, keywords=0.0, style=float(named_style), dropout=0.0)
    rows = []
    for k in range(count):
        index = k * len(pairs) // count
        sample = pairs.samples[index]
        rng = random.Random(sample.id)
        caption = rng.choice(descriptions(sample)) if image_first else draw_caption(sample, captions, rng)
        rows.append(_row(pairs, index, caption, text, model, image_first))
    return [collate(model.vocabulary, rows[i : i + 32], config.text_weight) for i in range(0, count, 32)]


def mean_bits(model: Transformer, batches: list[RowBatch], device: torch.device) -> dict[str, float]:
    """Mean `image_bits` and `text_bits` of a model over batches, by rows: the last batch may be smaller."""
    losses = [model.loss(batch.to(device)) for batch in batches]
    rows = [len(batch.tokens) for batch in batches]
    return {
        name: sum(float(loss[name]) * count for loss, count in zip(losses, rows, strict=True)) / sum(rows)
        for name in ("image_bits", "text_bits")
    }


def _row(
    pairs: CodedPairs,
    index: int,
    caption: str,
    text: CaptionEncoder,
    model: TransformerConfig,
    image_first: bool = False,
) -> Row:
    ids = text.encode(caption) if caption else []
    codes, sizes = pairs.codes[index], (model.max_text, model.position_kind)
    if image_first:
        return caption_row(model.vocabulary, [ids], codes, *sizes)
    return training_row(model.vocabulary, ids, codes, *sizes)


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
