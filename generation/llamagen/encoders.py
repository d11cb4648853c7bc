"""What makes the vectors of a prompt for a generator that reads such vectors: a T5 encoder, or a store of them.

A folder of an encoder has config.json (`EncoderConfig`) and model.safetensors. The text part of the model gives what is
encoded: the pieces of a prompt, or the number of a stored one.
Shapes: n vectors of a prompt, C numbers in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from data.options import WIDTH, check_options, option
from vqvae.storage.folders import read_object, read_weights_file, read_weights_folder
from vqvae.storage.parts import ModelError, without_weights
from vqvae.storage.published import FLOATS, Made, check_tensors, shown, stream_part

if TYPE_CHECKING:
    from transformers import T5EncoderModel

# what decides the encoder; the rest of a published config.json is about training and the decoder
T5_FIELDS = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj", "layer_norm_epsilon",
    "relative_attention_num_buckets", "relative_attention_max_distance",
)  # fmt: skip
T5_DTYPE = torch.bfloat16  # LlamaGen's script computes it so


@dataclass(frozen=True)
class EncoderConfig:
    """config.json of an encoder: "t5" with the sizes of transformers' T5Config, or "stored" vectors; C is `width`."""

    kind: Literal["t5", "stored"]
    width: int = option(help="Numbers in a vector.", least=1, most=WIDTH)
    t5: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_options(self)


class VectorEncoder(Protocol):
    """Pieces to vectors."""

    def vectors(self, pieces: Sequence[int]) -> Tensor:
        """Float32 [n, C] on the CPU."""


class StoredPrompts:
    """The vectors of prompts that are known."""

    def __init__(self, folder: Path) -> None:
        self._tensors = load_file(folder / "model.safetensors")

    def vectors(self, pieces: Sequence[int]) -> Tensor:
        """Those of the one prompt with this number."""
        (number,) = pieces
        return self._tensors[str(number)].float()


class T5Prompts:
    """The last hidden states of a T5 encoder (Raffel et al. 2020, arXiv:1910.10683), by transformers."""

    def __init__(self, folder: Path, config: EncoderConfig, device: torch.device) -> None:
        self._model = _empty_t5(config.t5)
        tensors = load_file(folder / "model.safetensors")
        self._model.load_state_dict(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}, assign=True)
        self._model.eval().to(device)

    @torch.inference_mode()
    def vectors(self, pieces: Sequence[int]) -> Tensor:
        tokens = torch.tensor([list(pieces)], device=self._model.shared.weight.device)
        hidden: Tensor = self._model(input_ids=tokens).last_hidden_state
        return hidden[0].float().cpu()


def read_encoder_config(folder: Path) -> EncoderConfig:
    """What an encoder is. Raises `ModelError`."""
    record = read_object(folder / "config.json")
    kind, width, sizes = record.get("kind"), record.get("width"), record.get("t5", {})
    if kind not in ("t5", "stored") or not isinstance(width, int) or not isinstance(sizes, dict):
        raise ModelError(f"{folder} holds no encoder of prompts")
    try:
        return EncoderConfig(kind, width, sizes)
    except ValueError as error:
        raise ModelError(f"{folder} holds no encoder of prompts: {error}") from error


def encoder_bytes(folder: Path) -> int:
    """Bytes of weights that an encoder takes on the device; stored vectors are read from their file."""
    path = folder / "model.safetensors"
    return path.stat().st_size if read_encoder_config(folder).kind == "t5" else 0


def load_prompt_encoder(folder: Path, device: torch.device) -> VectorEncoder:
    """The encoder in a folder. Raises `ModelError`."""
    config = read_encoder_config(folder)
    if config.kind == "stored":
        return StoredPrompts(folder)
    try:
        return T5Prompts(folder, config, device)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{folder} does not hold the encoder that its config.json describes: {reason}") from error


def _empty_t5(sizes: dict[str, Any]) -> T5EncoderModel:
    from transformers import T5Config, T5EncoderModel

    with without_weights():
        return T5EncoderModel(T5Config(**sizes))


def import_t5(source: Path, folder: Path) -> tuple[EncoderConfig, str]:
    """Convert the encoder of a published T5 folder to the new part `folder`; returns its config and content hash.

    The decoder, if there is one, stays behind. Numbers are stored in bfloat16. Raises `ModelError`.
    """
    record = read_object(source / "config.json")
    if record.get("model_type") != "t5":
        raise ModelError(f"{source} holds no T5 encoder: its model_type is {record.get('model_type')!r}, not 't5'")
    sizes = {name: record[name] for name in T5_FIELDS if name in record}
    try:
        model = _empty_t5(sizes)
    except Exception as error:  # transformers checks its fields by several libraries
        raise ModelError(
            f"{source / 'config.json'} does not fit: {shown(' '.join(str(error).split()), 200)}"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = "encoder.embed_tokens.weight"
    shapes.pop(tied)
    found = {
        key: value
        for key, value in read_weights_folder(source).items()
        if isinstance(key, str) and key.startswith(("encoder.", "shared.")) and key != tied
    }
    check_tensors(found, shapes, source)
    config = EncoderConfig("t5", int(model.config.d_model), sizes)
    return config, stream_part(folder, config, {name: _rounded(found[name]) for name in shapes})


def _rounded(tensor: Tensor) -> Made:
    return Made(tuple(tensor.shape), T5_DTYPE, lambda: tensor.to(T5_DTYPE))


def import_vectors(path: Path, width: int, longest: int, folder: Path) -> tuple[list[str], str]:
    """Convert a file of prompts' vectors to the new part `folder`; returns the prompts and the content hash.

    The file is .safetensors; a key is a prompt, and its tensor [n, C] the vectors of its n pieces, without padding.
    Raises `ModelError` for a file that is damaged, or vectors that a generator of `width` and `longest` does not read.
    """
    found = read_weights_file(path) if path.suffix == ".safetensors" else {}
    if not found:
        raise ModelError(f"{path} holds no vectors of prompts: it must be .safetensors, with prompts for keys")
    prompts = sorted(found)
    for prompt in prompts:
        tensor = found[prompt]
        if not prompt.strip() or tensor.ndim != 2 or tensor.shape[1] != width or not 1 <= len(tensor) <= longest:
            raise ModelError(
                f"{path}: {shown(prompt, 40)!r} has the shape {list(tensor.shape)}, and the generator reads 1 to "
                f"{longest} vectors of {width}"
            )
        if tensor.dtype not in FLOATS or not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{path}: the vectors of {shown(prompt, 40)!r} are not all finite numbers")
    tensors = {str(number): found[prompt].float().contiguous() for number, prompt in enumerate(prompts)}
    return prompts, stream_part(folder, EncoderConfig("stored", width), tensors)
