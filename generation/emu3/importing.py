"""Imports Emu3's weights, in transformers' layout or the first: maps their tensors to ours, converts them.

What is not drawn with stays behind: the head of the text, which has most of its rows.
N image codes, T text pieces, D width, V vocabulary (padded).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from generation.emu3.configuration import Emu3Files
from generation.emu3.first_layout import first_name
from generation.llama import llama_shapes, llama_tensors
from generation.transformer.config import TransformerConfig
from vqvae.movq import MoVQ
from vqvae.storage.folders import read_weights_folder
from vqvae.storage.parts import without_weights
from vqvae.storage.published import Made, check_tensors, common_dtype, stream_part

UNUSED = re.compile(r".*\.(num_batches_tracked|rotary_emb\.inv_freq)")


@dataclass(frozen=True)
class Emu3Tensors:
    """A folder's tensors, and what its keys begin with: files hold other names than transformers' own modules do.

    `drawn` are those of the picture tokenizer, in the first layout, which has a folder for them.
    """

    files: Emu3Files
    found: dict[Any, Any]
    text: str = "text_model.model."
    pictures: str = "vqmodel."
    head: str = "text_model.lm_head.weight"
    drawn: dict[Any, Any] | None = None

    @property
    def embedding(self) -> str:
        return f"{self.text}embed_tokens.weight"

    def text_shapes(self, config: TransformerConfig) -> dict[str, tuple[int, ...]]:
        """The keys and shapes of everything that becomes the transformer."""
        whole = (int(self.files.language["vocab_size"]), config.width)
        return llama_shapes(config, self.text) | {self.embedding: whole, self.head: whole}

    def picture_keys(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The names of the picture tokenizer's tensors, each with its published key and shape."""
        with without_weights():
            module: nn.Module = MoVQ(self.files.tokenizer)
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        if self.drawn is not None:
            return {name: first_name(name, shape) for name, shape in shapes.items()}
        return {name: (f"{self.pictures}{name}", shape) for name, shape in shapes.items()}


def read_emu3_weights(files: Emu3Files) -> Emu3Tensors:
    """What drawing reads of a folder's tensors. Raises `ModelError` as `read_weights_folder` does."""
    found = _read_used(files.folder)
    if files.pictures is not None:
        return Emu3Tensors(files, found, "model.", "", "lm_head.weight", _read_used(files.pictures))
    if any(isinstance(key, str) and key.startswith("model.") for key in found):
        return Emu3Tensors(files, found, "model.text_model.", "model.vqmodel.", "lm_head.weight")
    return Emu3Tensors(files, found)


def _read_used(folder: Path) -> dict[Any, Any]:
    return {
        key: tensor
        for key, tensor in read_weights_folder(folder).items()
        if not (isinstance(key, str) and UNUSED.fullmatch(key))
    }


def check_emu3(tensors: Emu3Tensors, config: TransformerConfig) -> None:
    """Raises `ModelError` that names the tensors which are missing, unexpected, of another shape or damaged."""
    files, texts, pictures = tensors.files, tensors.text_shapes(config), dict(tensors.picture_keys().values())
    if tensors.drawn is None or files.pictures is None:
        check_tensors(tensors.found, texts | pictures, files.folder)
    else:
        check_tensors(tensors.found, texts, files.folder)
        check_tensors(tensors.drawn, pictures, files.pictures)


def write_emu3_tokenizer(tensors: Emu3Tensors, folder: Path) -> str:
    """Write the checked image tokenizer to the new part `folder`; returns its content hash."""
    found = tensors.found if tensors.drawn is None else tensors.drawn
    keys = tensors.picture_keys()
    named = {name: found[key] for name, (key, _) in keys.items()}
    common_dtype(named, tensors.files.pictures or tensors.files.folder)
    # 1x1 convolutions are matrices
    flat = {name: value[..., 0, 0] if name.endswith("_proj.weight") and value.ndim == 4 else value
            for name, value in named.items()}  # fmt: skip
    return stream_part(folder, tensors.files.tokenizer, flat)


def write_emu3_generator(tensors: Emu3Tensors, config: TransformerConfig, folder: Path) -> str:
    """Write the checked transformer to the new part `folder`, tensor by tensor; returns its content hash."""
    found, codes = tensors.found, torch.tensor(tensors.files.code_ids)
    dtype = common_dtype({key: found[key] for key in tensors.text_shapes(config)}, tensors.files.folder)
    made = llama_tensors(found, config, tensors.text, dtype)
    shape = (config.vocabulary.padded_size, config.width)
    made["embed.weight"] = Made(shape, dtype, lambda: _embedding(found[tensors.embedding], codes, config))
    made["head.weight"] = Made((len(codes), config.width), dtype, lambda: found[tensors.head][codes])
    return stream_part(folder, config, made)


def _embedding(published: Tensor, codes: Tensor, config: TransformerConfig) -> Tensor:
    """[V, D]: the vectors of the codes, those of the text pieces, zeros."""
    embed = torch.zeros(config.vocabulary.padded_size, config.width, dtype=published.dtype)
    embed[: len(codes)] = published[codes]
    texts = config.vocabulary.text_range
    embed[texts.start : texts.stop] = published[: len(texts)]
    return embed
