"""Imports Janus' published weights: maps its tensors to ours, folds what can be folded, converts them.

What is not drawn with stays behind: the understanding tower, its aligner, and the head of the text.
N image codes, T text pieces, D width, V vocabulary (padded).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.janus.configuration import FLOW
from generation.llama import llama_shapes, llama_tensors
from generation.transformer.config import TransformerConfig
from vqvae.storage.parts import ModelError
from vqvae.storage.published import Made, Source, check_tensors, common_dtype, converted, stream_part
from vqvae.vq16 import VQ16Config
from vqvae.vq16_keys import KeyLayout, vq16_config, vq16_sources

TOKENIZER_PREFIX: dict[KeyLayout, str] = {"original": "gen_vision_model.", "transformers": "model.vqmodel."}
LANGUAGE: dict[KeyLayout, str] = {"original": "language_model.model.", "transformers": "model.language_model."}
CODES: dict[KeyLayout, dict[str, str]] = {  # what the codes' vectors, and the logits of the codes, are made by
    "original": {
        "table": "gen_embed.weight",
        "first": "gen_aligner.layers.0",
        "second": "gen_aligner.layers.2",
        "expand": "gen_head.output_mlp_projector",
        "project": "gen_head.vision_head",
    },
    "transformers": {
        "table": "model.generation_embeddings.weight",
        "first": "model.generation_aligner.fc1",
        "second": "model.generation_aligner.hidden_layers.0",
        "expand": "model.generation_head.proj_out",
        "project": "model.generation_head.vision_head",
    },
}
UNUSED = re.compile(
    r"(model\.)?(vision_model|aligner)\..*|(language_model\.)?lm_head\.weight"
    r"|gen_vision_model\.quantize\.codebook_used|.*\.rotary_emb\.inv_freq"
)
AT_ONCE = 1024  # codes whose vectors are made together


def used_tensors(found: Mapping[Any, Any], path: Path) -> dict[Any, Any]:
    """What drawing reads of a folder's tensors. Raises `ModelError` for those of JanusFlow."""
    if any(isinstance(key, str) and key.startswith("vision_gen_") for key in found):
        raise ModelError(f"{path} is refused: {FLOW}")
    return {key: value for key, value in found.items() if not (isinstance(key, str) and UNUSED.fullmatch(key))}


def tokenizer_of(found: Mapping[str, Any], layout: KeyLayout, path: Path) -> VQ16Config:
    """The sizes of the image tokenizer in the folder. Raises `ModelError`."""
    return vq16_config(found, TOKENIZER_PREFIX[layout], layout, path)


def language_shapes(config: TransformerConfig, layout: KeyLayout, code_dim: int) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of everything that becomes the transformer."""
    width, prefix, keys = config.width, LANGUAGE[layout], CODES[layout]
    shapes: dict[str, tuple[int, ...]] = {
        **llama_shapes(config, prefix),
        f"{prefix}embed_tokens.weight": (config.num_text_pieces, width),
        keys["table"]: (config.num_image_codes, code_dim),
    }
    sizes = {"first": (width, code_dim), "second": (width, width), "expand": (width, width)}
    for name, size in {**sizes, "project": (config.num_image_codes, width)}.items():
        shapes |= {f"{keys[name]}.weight": size, f"{keys[name]}.bias": size[:1]}
    return shapes


def check_janus(
    found: Mapping[Any, Any], config: TransformerConfig, tokenizer: VQ16Config, layout: KeyLayout, path: Path
) -> None:
    """Raises `ModelError` that names the tensors which are missing, unexpected, of another shape or damaged."""
    sources = vq16_sources(tokenizer, TOKENIZER_PREFIX[layout], layout).values()
    shapes = {source.key: source.shape for source in sources}
    check_tensors(found, shapes | language_shapes(config, layout, tokenizer.code_dim), path)


def write_tokenizer(found: Mapping[str, Any], config: VQ16Config, layout: KeyLayout, folder: Path, path: Path) -> str:
    """Write the image tokenizer to the new part `folder`; returns its content hash."""
    sources: dict[str, Source] = vq16_sources(config, TOKENIZER_PREFIX[layout], layout)
    own = {source.key: found[source.key] for source in sources.values()}
    return stream_part(folder, config, converted(own, sources, path))


def write_generator(
    found: Mapping[str, Any], config: TransformerConfig, layout: KeyLayout, folder: Path, path: Path
) -> str:
    """Write the transformer to the new part `folder`, tensor by tensor; returns its content hash."""
    keys = language_shapes(config, layout, int(found[CODES[layout]["table"]].shape[1]))
    dtype = common_dtype({key: found[key] for key in keys}, path)
    codes = CODES[layout]
    embed = Made((config.vocabulary.padded_size, config.width), dtype, lambda: _embedding(found, config, layout))
    tensors = llama_tensors(found, config, LANGUAGE[layout], dtype) | {"embed.weight": embed}
    for name in ("expand", "project"):
        tensors |= {f"code_head.{name}.{kind}": found[f"{codes[name]}.{kind}"] for kind in ("weight", "bias")}
    return stream_part(folder, config, tensors)


def _embedding(found: Mapping[str, Any], config: TransformerConfig, layout: KeyLayout) -> Tensor:
    """[V, D]: the codes' vectors, which an MLP makes of a small table once and for all; the text's; zeros."""
    codes, text = CODES[layout], found[f"{LANGUAGE[layout]}embed_tokens.weight"]
    embed = torch.zeros(config.vocabulary.padded_size, config.width, dtype=text.dtype)
    layers = [
        (found[f"{codes[name]}.weight"].float(), found[f"{codes[name]}.bias"].float()) for name in ("first", "second")
    ]
    for start in range(0, config.num_image_codes, AT_ONCE):
        vectors = found[codes["table"]][start : start + AT_ONCE].float()
        vectors = F.linear(F.gelu(F.linear(vectors, *layers[0])), *layers[1])
        embed[start : start + len(vectors)] = vectors.to(embed.dtype)
    texts = config.vocabulary.text_range
    embed[texts.start : texts.stop] = text
    return embed
