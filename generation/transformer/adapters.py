"""A new style for a frozen generator: learned prompt vectors, low-rank updates of its matrices, or both.

Prompt vectors (P-tuning, Liu et al. 2021, arXiv:2103.10385) stand before the text, `[ROI1] v1..vk text [SIZE] [BOI1]
codes`, and take k of its `max_text` places. They are part of the prompt, so the unconditional row of classifier-free
guidance has none: guidance then strengthens the style as it strengthens the words. LoRA (Hu et al. 2021,
arXiv:2106.09685) is added to the matrices, and so acts on both rows.

An adapter on disk is a folder: config.json (`AdapterConfig`) and adapter.safetensors, with `prompt` [k, D] and
`{linear layer}.lora_A` [r, in], `.lora_B` [out, r].
Shapes: B rows, T tokens, D width, V vocabulary (padded), k prompt vectors, r rank.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.atomic import write_files
from data.config import ConfigError, from_dict, to_dict
from data.options import WIDTH, check_options, option
from data.records import parse_json
from generation.rows.vocabulary import Vocabulary
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from vqvae.storage.parts import ModelError

FORMAT = "mmwudao-adapter/1"
CONFIG, WEIGHTS = "config.json", "adapter.safetensors"
MAX_SHARE = 0.02  # of the generator's parameters that an adapter may train
TARGETS = ["qkv", "project", "expand"]  # the linear layers of a block

Method = Literal["ptuning", "lora", "both"]


@dataclass
class AdapterOptions:
    """What is trained. `prompt_vectors` and `encoder_width` belong to P-tuning, `rank` and `alpha` to LoRA."""

    method: Method = "both"
    prompt_vectors: int = option(8, "Vectors before the text.", least=1, most=2**16)
    encoder_width: int = option(32, "The width of the network that makes them, which is even.", least=2, most=WIDTH)
    rank: int = option(4, "The rank of the updates of the matrices.", least=1, most=WIDTH)
    alpha: float = option(8.0, "The update is alpha / rank * B A.", above=0, most=1e6)

    def __post_init__(self) -> None:
        check_options(self)
        if self.encoder_width % 2:
            raise ValueError(f"encoder_width must be even, not {self.encoder_width}")


@dataclass(frozen=True)
class AdapterConfig:
    """config.json of an adapter: the style's name and the hashes (SHA-256) of the base generator and of the weights."""

    style: str
    method: Method
    alpha: float = option(help="The update is alpha / rank * B A.", above=0, most=1e6)
    generator: str = option(help="The content hash of the base generator.")
    weights: str = option(help="The hash of the bytes of adapter.safetensors.")

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def hash(self) -> str:
        """Identifies the adapter in the recipe of a picture."""
        return sha256(json.dumps(to_dict(self), sort_keys=True).encode()).hexdigest()


@dataclass
class AdaptedConfig(TransformerConfig):
    """The configuration of a generator with prompt vectors; never stored."""

    num_prompt_vectors: int = option(0, "Vectors before the text.", least=0, most=2**16)

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.num_image_codes, self.num_text_pieces, self.num_prompt_vectors)


class PromptVectors(nn.Module):
    """Prompt vectors [k, D] as they are."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors, requires_grad=False)

    def forward(self) -> Tensor:
        return self.vectors


class PromptEncoder(nn.Module):
    """Prompt vectors [k, D] made by a small network, for training: MLP([forward LSTM, backward LSTM]) of k inputs.

    This is the prompt encoder of P-tuning: vectors trained directly, one by one, are hard to optimise. Only its output
    is kept after training.
    """

    def __init__(self, count: int, width: int, encoder_width: int) -> None:
        super().__init__()
        self.inputs = nn.Parameter(torch.randn(count, encoder_width))
        self.lstm = nn.LSTM(encoder_width, encoder_width // 2, bidirectional=True)
        self.mlp = nn.Sequential(nn.Linear(encoder_width, encoder_width), nn.ReLU(), nn.Linear(encoder_width, width))

    def forward(self) -> Tensor:
        hidden, _ = self.lstm(self.inputs)
        return self.mlp(hidden)


class PromptEmbedding(nn.Embedding):
    """An embedding with the ids V, V+1, ... for prompt vectors; `weight` [V, D], which logits share, has no more rows.

    `prompt()` gives the vectors [k, D].
    """

    def __init__(self, embed: nn.Embedding, prompt: nn.Module) -> None:
        super().__init__(embed.num_embeddings, embed.embedding_dim, _weight=embed.weight.detach(), _freeze=True)
        self.prompt = prompt

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] to [B, T, D]."""
        place = ids - self.num_embeddings
        known = F.embedding(ids.clamp(max=self.num_embeddings - 1), self.weight)
        return torch.where((place >= 0).unsqueeze(-1), self.prompt()[place.clamp(min=0)].to(known.dtype), known)


def add_prompt(model: Transformer, prompt: nn.Module, count: int) -> None:
    """Let `model` read `count` prompt vectors, as the raw text pieces `model.config.vocabulary.prompt_pieces`."""
    model.embed = PromptEmbedding(model.embed, prompt)
    model.config = AdaptedConfig(**vars(model.config), num_prompt_vectors=count)


def make_trainable(model: Transformer, options: AdapterOptions) -> int:
    """Freeze `model` and add to it what `options` says; returns the number of parameters that are left to train.

    Raises `ConfigError` when that is not under `MAX_SHARE` of the model's own, or the prompt leaves no place for text.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    model.requires_grad_(False)
    if options.method != "ptuning":
        from peft import LoraConfig, inject_adapter_in_model

        lora = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=TARGETS)  # type: ignore[arg-type]
        inject_adapter_in_model(lora, model)
    if options.method != "lora":
        if options.prompt_vectors >= model.config.max_text:
            raise ConfigError(
                f"prompt_vectors={options.prompt_vectors} leaves no place for words: "
                f"this generator reads {model.config.max_text} pieces of text"
            )
        encoder = PromptEncoder(options.prompt_vectors, model.config.width, options.encoder_width)
        add_prompt(model, encoder, options.prompt_vectors)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trained >= MAX_SHARE * total:
        raise ConfigError(
            f"the adapter would train {trained:,} parameters, {trained / total:.2%} of the generator's {total:,}; "
            f"it must stay under {MAX_SHARE:.0%}: lower rank, encoder_width or prompt_vectors"
        )
    return trained


def save_adapter(
    model: Transformer, folder: Path, style: str, options: AdapterOptions, generator: str
) -> AdapterConfig:
    """Write what `make_trainable` added to `model` as an adapter for the generator with that content hash."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    if isinstance(model.embed, PromptEmbedding):
        tensors["prompt"] = model.embed.prompt()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            tensors[name.removesuffix(".default.weight")] = parameter
    data = save({name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()})
    config = AdapterConfig(style, options.method, options.alpha, generator, sha256(data).hexdigest())
    record = json.dumps({"format": FORMAT, **to_dict(config)}, ensure_ascii=False, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_files({folder / WEIGHTS: data, folder / CONFIG: record.encode()})
    return config


def read_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """An adapter's configuration and tensors. Raises `ModelError` for a folder that holds none, or a damaged one."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ModelError(f"{folder} is no adapter: {file} is missing")
    try:
        record = parse_json((folder / CONFIG).read_bytes())
    except ValueError as error:
        raise ModelError(f"{folder / CONFIG} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
        raise ModelError(f'{folder / CONFIG} does not describe an adapter: its "format" must be {FORMAT!r}')
    try:
        config = from_dict(AdapterConfig, record)
    except ConfigError as error:
        raise ModelError(f"{folder / CONFIG}: {error}") from error
    data = (folder / WEIGHTS).read_bytes()
    if sha256(data).hexdigest() != config.weights:
        raise ModelError(f"{folder / WEIGHTS} is damaged: it is not the file that config.json names")
    try:
        return config, load(data)
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS} is damaged ({error})") from error


@torch.no_grad()
def apply_adapter(model: Transformer, folder: Path, generator: str) -> AdapterConfig:
    """Give `model`, whose content hash is `generator`, the style in `folder`: LoRA is added to its matrices.

    Raises `ModelError` for an adapter that is damaged or made for another generator; `model` is then as it was.
    """
    config, tensors = read_adapter(folder)
    if config.generator != generator:
        raise ModelError(
            f"{folder} is an adapter of another generator: of {config.generator[:12]}, not of {generator[:12]}"
        )
    prompt = tensors.pop("prompt", None)
    updates: list[tuple[Tensor, Tensor]] = []
    try:
        for name in sorted({name.rpartition(".")[0] for name in tensors}):
            down, up = tensors[f"{name}.lora_A"].float(), tensors[f"{name}.lora_B"].float()
            weight = model.get_parameter(f"{name}.weight")
            updates.append((weight, (weight.float() + (config.alpha / len(down) * up @ down).to(weight.device))))
        fits = all(updated.shape == weight.shape for weight, updated in updates)
    except (AttributeError, KeyError, RuntimeError):  # no such layer, half of a pair, or sizes that do not multiply
        fits = False
    if not fits or (prompt is not None and prompt.shape[1:] != (model.config.width,)):
        raise ModelError(f"{folder / WEIGHTS} does not fit the generator: it names other layers or sizes")
    for target, updated in updates:
        target.copy_(updated)
    if prompt is not None:
        vectors = PromptVectors(prompt.to(model.embed.weight.device, model.embed.weight.dtype))
        add_prompt(model, vectors, len(prompt))
    return config
