"""Train the generator: `mmwudao train generator CONFIG`.

Reads shards of codes (`mmwudao tokenize`), trains the transformer with the shared loop, and logs the bits per image
token on held-out splits and sheets of sample pictures. Under torchrun, every process takes its part of each batch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from data.codes import tokenizer_hash
from data.config import ConfigError, to_stored
from data.reading import open_shards
from data.styles import without_style
from data.text import TextTokenizer
from generation.drawing.decoding import generate_codes
from generation.drawing.sampling import SamplingOptions
from generation.rows.mixture import Mixture
from generation.rows.prompt import Prompt
from generation.rows.row import RowBatch
from generation.training.batches import RowBatches, RowMaker, answer_accuracy, held_out_batches, mean_bits
from generation.training.config import GeneratorDataConfig, GeneratorTrainConfig
from generation.training.features import FeatureEncoder, StoredFeatures, caption_names, picture_key, prepare_features
from generation.training.matching import MatchObjective, match_figures, prepare_head
from generation.training.pairs import CodedPairs, unigram_bits
from generation.transformer.config import TransformerConfig
from generation.transformer.expert_parallel import split_experts
from generation.transformer.experts import Experts
from generation.transformer.model import MLP, Block, Transformer
from generation.transformer.tensor_parallel import split_blocks
from vqvae.model import VQVAE
from vqvae.storage.parts import content_hash, load_part, save_part
from vqvae.training.loop import train_model
from vqvae.training.process import distributed, rank, world_size
from vqvae.training.sharding import Cut
from vqvae.training.task import Task

SPARSE = {"sparse_window", "sparse_windows", "sparse_pivots"}
CHANGEABLE = {"dropout", "pb_relax", "tokenizer_hash", "text_hash", "fills"} | SPARSE


class LossModule(nn.Module):
    """The model with its loss as `forward`, which is what DDP and torch.compile wrap."""

    def __init__(self, model: Transformer, objective: MatchObjective | None = None) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: RowBatch, total: Tensor) -> dict[str, Tensor]:
        """The losses of `batch`; `total` is the mean sum of weights of this process's micro-batches."""
        losses = self._predicted(batch, total) if batch.labels is None else self._matched(batch)
        if self.model.config.match.used:
            # no kind of rows needs all weights, and DDP waits for the gradient of each
            losses["loss"] = losses["loss"] + 0 * sum(weight.sum() for weight in self._not_of_all_kinds())
        return losses

    def _not_of_all_kinds(self) -> list[Tensor]:
        parts = ("match_head", "feature_map", "head", "code_head")
        found = [getattr(self.model, part) for part in parts if hasattr(self.model, part)]
        return [weight for part in found for weight in part.parameters()]

    def _matched(self, batch: RowBatch) -> dict[str, Tensor]:
        assert self.objective is not None
        assert batch.labels is not None
        (images, texts), scale = self.model.match(batch), self.model.match_head.scale
        with torch.autocast(images.device.type, enabled=False):  # similarities need float32
            loss = self.objective.loss(images, texts, batch.labels, scale)
        return self.model.with_balance({"loss": loss, "match_loss": loss.detach(), "temperature": 1 / scale.detach()})

    def _predicted(self, batch: RowBatch, total: Tensor) -> dict[str, Tensor]:
        if distributed():
            # DDP averages gradients: dividing by the mean weight of all processes gives those of one large batch
            total = total.clone()
            dist.all_reduce(total)
            total = total / world_size()
        return self.model.loss(batch, total)


def train(
    config: GeneratorTrainConfig,
    resume: bool = False,
    encoder: FeatureEncoder | None = None,
    objective: MatchObjective | None = None,
) -> Path:
    """Train the generator and save its averaged weights; returns their folder, `out`/generator.

    `encoder` makes the prompt features that are not on disk yet; `objective` is that of rows that are matched. Raises
    `ValueError` for settings that do not fit the data.
    """
    if objective is None and "match" in Mixture(config.mix).shares:
        raise ConfigError("mix.match needs an objective: train with `mmwudao train generator`, which brings one")
    return train_model(config.loop, lambda device: _task(config, device, encoder, objective), resume, config.parallel)


def _task(
    config: GeneratorTrainConfig,
    device: torch.device,
    encoder: FeatureEncoder | None,
    objective: MatchObjective | None,
) -> Task:
    text = TextTokenizer(Path(config.data.text_model))
    pairs = CodedPairs(Path(config.data.codes), config.data.train, config.data.exclude_families)
    tests = _test_pairs(config.data)
    tokenizer = _sheet_tokenizer(config.data, tokenizer_hash(Path(config.data.codes)))
    families = sorted({str(sample.family) for sample in pairs.samples})
    samples = {prompt: without_style(prompt, families) for prompt in config.sample_prompts}  # and what is shown
    names = set().union(*(caption_names(some.samples) for some in (pairs, *tests.values())))
    features = _stored_features(config, names.union(samples.values()), {config.data.train: pairs, **tests}, encoder)
    model_config = _model_config(config, text, pairs, tokenizer)
    if features is not None:
        found = {"width": features.width, "towers_hash": features.towers_hash}
        model_config.prompt_features = replace(model_config.prompt_features, **found)
    model = _model(config, model_config)
    maker = RowMaker(text, model_config, config, features)
    batches = RowBatches(pairs, maker)
    held_out = _held_out_splits(pairs, tests, maker)

    def loss_of(wrapped: nn.Module, micro_batch: tuple[RowBatch, Tensor]) -> dict[str, Tensor]:
        batch, total = micro_batch
        losses = wrapped(batch.to(device), total.to(device))
        if batch.labels is not None:
            return losses
        if batch.segments is not None:
            name = "answer_bits" if batch.kind == "answer" else "caption_bits"
            return {"loss": losses["loss"], name: losses["text_bits"]}
        if batch.levels is not None:
            return {"loss": losses["loss"], "fill_bits": losses["image_bits"]}
        return losses

    def evaluate(averaged: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(averaged, LossModule)
        figures: dict[str, float] = {}
        for test in held_out:
            figures |= test.figures(averaged.model, device, objective)
        if rank() == 0 and tokenizer is not None and config.sample_prompts and step % config.sample_every == 0:
            prompts = [
                Prompt(tuple(text.encode(prompt)), features.of_text(shown) if features else None)
                for prompt, shown in samples.items()
            ]
            _write_sheet(averaged.model, tokenizer, prompts, Path(config.loop.out) / "sheets" / f"{step:06d}.png")
        return figures

    def save(averaged: nn.Module, folder: Path) -> None:
        assert isinstance(averaged, LossModule)
        save_part(averaged.model, folder)

    return Task(
        LossModule(model, objective), batches, loss_of, evaluate, "generator", save, origin=_origin(model_config),
        plans={"tensor": _tensor_plan, "expert": _expert_plan},
        after_step=model.adjust_experts if model_config.experts.used else None,
    )  # fmt: skip


def _origin(config: TransformerConfig) -> dict[str, str]:
    # of the configuration, what a run cannot change halfway although all shapes stay
    fixed = {name: value for name, value in to_stored(config).items() if name not in CHANGEABLE}
    return {
        "image tokenizer (data.codes)": config.tokenizer_hash,
        "text model (data.text_model)": config.text_hash,
        "configuration (model)": json.dumps(fixed, sort_keys=True),
    }


def _tensor_plan(module: nn.Module, mesh: DeviceMesh) -> dict[str, Cut]:
    assert isinstance(module, LossModule)
    return split_blocks(module.model, mesh, "model.")


def _expert_plan(module: nn.Module, mesh: DeviceMesh) -> dict[str, Cut]:
    assert isinstance(module, LossModule)
    return split_experts(module.model, mesh, "model.")


@dataclass(frozen=True)
class HeldOutSplit:
    """Batches of one held-out split, and its bits per image token under the code frequencies of the training split."""

    name: str
    batches: dict[str, list[RowBatch]]  # by kind: "draw" and those others that the generator learns
    unigram_bits: float

    def figures(
        self, model: Transformer, device: torch.device, objective: MatchObjective | None = None
    ) -> dict[str, float]:
        """What the log says of `model` on this split."""
        found = mean_bits(model, self.batches["draw"], device)
        if describe := self.batches.get("describe"):
            found["caption_bits"] = mean_bits(model, describe, device)["text_bits"]
        if fill := self.batches.get("fill"):
            found["fill_bits"] = mean_bits(model, fill, device)["image_bits"]
        if answer := self.batches.get("answer"):
            found["answer_bits"] = mean_bits(model, answer, device)["text_bits"]
            found["answer_accuracy"] = answer_accuracy(model, answer, device)
        if match := self.batches.get("match"):
            assert objective is not None
            found |= match_figures(model, match, objective, device)
        found["unigram_bits"] = self.unigram_bits
        return {f"{self.name}/{name}": value for name, value in found.items()}


def _test_pairs(data: GeneratorDataConfig) -> dict[str, CodedPairs]:
    return {name: CodedPairs(Path(data.codes), name, data.exclude_families) for name in data.test}


def _stored_features(
    config: GeneratorTrainConfig, texts: set[str], splits: dict[str, CodedPairs], encoder: FeatureEncoder | None
) -> StoredFeatures | None:
    """The vectors of all texts, and of the pictures of `splits` if rows are made from those; None if there are none.

    The first process makes what is missing.
    """
    if not config.model.prompt_features.used:
        return None
    data = config.data
    if encoder is None and not data.features:
        raise ConfigError("model.prompt_features: name the towers that make the vectors in data.towers")
    path = Path(data.features or Path(data.codes) / f"features-{encoder.hash[:12] if encoder else ''}.safetensors")
    if encoder is not None and rank() == 0:
        if config.from_picture and not data.pictures:
            raise ConfigError("from_picture: name the shards of pictures that the codes were made of in data.pictures")
        shown = splits if config.from_picture else {}
        ids = {sample.id for pairs in shown.values() for sample in pairs.samples}
        prepare_features(
            path, encoder, texts, ids, chain.from_iterable(open_shards(data.pictures, one) for one in shown)
        )
    if distributed():
        dist.barrier()
    stored = StoredFeatures(path)
    if config.from_picture:
        texts = texts.union(picture_key(sample.id) for pairs in splits.values() for sample in pairs.samples)
    missing = [text for text in sorted(texts) if text not in stored]
    if missing:
        raise ConfigError(f"{path} holds no vector of {missing[0]!r} and {len(missing) - 1} more: name data.towers")
    return stored


def _held_out_splits(train_pairs: CodedPairs, tests: dict[str, CodedPairs], maker: RowMaker) -> list[HeldOutSplit]:
    learned = Mixture(maker.config.mix).shares
    splits = []
    for name, pairs in tests.items():
        kinds = dict.fromkeys(["draw", *learned])
        batches = {kind: held_out_batches(pairs, maker, kind, named_style=kind != "match") for kind in kinds}
        unigram = unigram_bits(train_pairs, pairs, maker.model.num_image_codes)
        splits.append(HeldOutSplit(name, batches, unigram))
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
        fills="fill" in Mixture(config.mix).shares,
    )
    if int(pairs.codes.max()) >= completed.num_image_codes:
        raise ConfigError(f"model.num_image_codes={completed.num_image_codes}, but {folder} holds larger codes")
    return completed


def _model(config: GeneratorTrainConfig, sizes: TransformerConfig) -> Transformer:
    """The model to train, of `sizes`, ready for it."""
    model = _upcycled(config.upcycle, sizes) if config.upcycle else _start(config.start_from, sizes)
    prepare_head(model, config.match)
    if config.checkpoint_gradients:
        model.checkpoint_gradients()
    if config.loop.compile:
        for layer, block in enumerate(model.blocks):
            if not sizes.experts.at(layer):  # what each expert is given differs from step to step
                block.compile(dynamic=True)  # rows differ in length from batch to batch
    return model


def _start(folder: str, config: TransformerConfig) -> Transformer:
    """A new model, with the weights of the trained one in `folder` if there is one."""
    model = Transformer(config)
    if folder:
        trained = load_part(Transformer, folder)
        # it may go on with other kinds of rows, with a first head to match, and with the vectors of other towers
        vectors = replace(trained.config.prompt_features, towers_hash=config.prompt_features.towers_hash)
        changed = replace(trained.config, fills=config.fills, prompt_features=vectors)
        if not trained.config.match.used:
            changed = replace(changed, match=config.match)
        if changed != config:
            raise ConfigError(f"start_from={folder} is a generator of another configuration or of other parts")
        model.load_state_dict(model.state_dict() | trained.state_dict())
    return model


def _upcycled(folder: str, config: TransformerConfig) -> Transformer:
    """A model with experts, each the MLP of the generator in `folder`, and the rest of it; routers start random."""
    model, dense = Transformer(config), load_part(Transformer, folder)
    changed = replace(dense.config, fills=config.fills, experts=config.experts)
    if changed != config or dense.config.experts.used:
        raise ConfigError(f"upcycle={folder} is a generator of another configuration or of other parts, or has experts")
    own = model.state_dict()
    own |= {name: weight for name, weight in dense.state_dict().items() if name in own}
    model.load_state_dict(own)
    for block, source in zip(model.blocks, dense.blocks, strict=True):
        assert isinstance(block, Block)
        assert isinstance(source, Block)
        if isinstance(block.mlp, Experts):
            assert isinstance(source.mlp, MLP)
            block.mlp.copy_dense(source.mlp.expand, source.mlp.project)
    return model


def _sheet_tokenizer(data: GeneratorDataConfig, expected: str) -> VQVAE | None:
    if not data.tokenizer:
        return None
    tokenizer = load_part(VQVAE, data.tokenizer)
    if content_hash(tokenizer) != expected:
        raise ConfigError(f"data.tokenizer={data.tokenizer} is not the tokenizer that made the codes in {data.codes}")
    return tokenizer


def _write_sheet(model: Transformer, tokenizer: VQVAE, prompts: list[Prompt], path: Path) -> None:
    from torchvision.utils import save_image

    options = SamplingOptions(guidance=2.0, top_k=100)
    codes = generate_codes(model, prompts, list(range(len(prompts))), options, grid=model.config.grid)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(tokenizer.decode(codes.cpu()), path, nrow=8)
