"""Imports LlamaGen's published weights (Sun et al. 2024, arXiv:2406.06525): maps its tensors to ours, converts them.

Its rotary positions turn the pairs (2p, 2p + 1) of a head, ours (p, p + d/2): the rows of q and k are reordered.
N image codes, T text pieces, D width, H heads, d head width, C numbers in a vector of a caption, M width of the MLP.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from generation.llamagen.settings import LlamaGenImport
from generation.rows.frame import PromptFrame
from generation.transformer.config import TransformerConfig
from generation.transformer.prompt_features import project_prompt
from vqvae.storage.folders import read_weights_file
from vqvae.storage.parts import ModelError
from vqvae.storage.published import Made, check_tensors, common_dtype, converted, layout_of, shape_of, stream_part
from vqvae.vq16 import VQ16Config
from vqvae.vq16_keys import vq16_config, vq16_sources

# width -> heads and layers of the published models, B to 7B
PUBLISHED = {768: (12, 12), 1024: (16, 24), 1280: (20, 36), 1536: (24, 48), 2560: (40, 48), 3200: (32, 24),
             2048: (32, 22), 4096: (32, 32)}  # fmt: skip
SIZES_IN_NAMES = re.compile(r"(?<!\d)(256|384|512)(?!\d)")
SECTIONS = ("model", "module", "state_dict")
LAYER = re.compile(r"layers\.(\d{1,4})\.")
UNUSED = ("freqs_cis", "quantize.codebook_used")
CLASSES = "cls_embedding.embedding_table.weight"
LEARNED = "cls_embedding.uncond_embedding"
FIRST, SECOND = "cls_embedding.cap_proj.fc1.weight", "cls_embedding.cap_proj.fc2.weight"
OWNER = "transformer of LlamaGen"

Draws = Literal["classes", "captions"]


@dataclass(frozen=True)
class LlamaGenFile:
    """A checkpoint's tensors, and what the model draws: a class, or a caption by the vectors of a text encoder."""

    path: Path
    tensors: dict[str, Any]
    draws: Draws

    @property
    def pieces(self) -> int:
        """Classes with that of no class; or the learned vectors that stand for no caption."""
        return int(self.tensors[CLASSES if self.draws == "classes" else LEARNED].shape[0])


def read_state(path: Path) -> dict[str, Any]:
    """The tensors of a file, which may lie under a key of it; nothing in it is run. Raises `ModelError`."""
    found = read_weights_file(path)
    inner = next((found[name] for name in SECTIONS if isinstance(found.get(name), dict)), found)
    return {key: value for key, value in inner.items() if key not in UNUSED}


def read_llamagen(path: Path) -> LlamaGenFile:
    """A checkpoint of the transformer. Raises `ModelError` for any other file."""
    found = read_state(path)
    if CLASSES not in found and LEARNED not in found:
        raise ModelError(f"{path} is no {OWNER}: it has neither {CLASSES} nor {LEARNED}, and looks like "
                         f"{layout_of(found)}")  # fmt: skip
    draws: Draws = "classes" if CLASSES in found else "captions"
    shape_of(found, CLASSES if draws == "classes" else LEARNED, 2, path, OWNER)
    return LlamaGenFile(path, found, draws)


def picture_side(path: Path, wanted: int | None, stride: int) -> int:
    """Codes along a side of the pictures, which the weights do not tell. Raises `ModelError` for what is no size."""
    named = {int(size) for size in SIZES_IN_NAMES.findall(path.stem)}
    if wanted is None and len(named) != 1:
        raise ModelError(f"{path} does not say in its name how large its pictures are: say it (--image-size 256)")
    size = named.pop() if wanted is None else wanted
    if size % stride or size // stride > 64:
        raise ModelError(f"the model cannot draw {size} px: a code stands for {stride}, and a side has 64 at most")
    return size // stride


def llamagen_config(file: LlamaGenFile, tokenizer: VQ16Config, settings: LlamaGenImport) -> TransformerConfig:
    """The transformer of a checkpoint. Raises `ModelError` for one that contradicts the tokenizer or itself."""
    found, path = file.tensors, file.path
    codes, width = shape_of(found, "tok_embeddings.weight", 2, path, OWNER)
    hidden = shape_of(found, "layers.0.feed_forward.w1.weight", 2, path, OWNER)[0]
    if codes != tokenizer.codebook_size:
        has = f"the tokenizer has {tokenizer.codebook_size}"
        raise ModelError(f"{path} draws {codes} codes, and {has}: it is another model's")
    heads, depth = _heads_and_layers(file, width, settings)
    classes = file.draws == "classes"
    side = picture_side(path, settings.image_size, tokenizer.stride)
    try:
        return TransformerConfig(
            num_image_codes=codes,
            num_text_pieces=file.pieces,
            width=width,
            depth=depth,
            heads=heads,
            max_text=1 if classes else file.pieces,
            grid=(side, side),
            norm="rmsnorm",
            norm_eps=1e-5,
            mlp="swiglu",
            mlp_width=hidden,
            position="rotary_codes",
            qk_norm=False,
            tie_embeddings=False,
            image_head="codes",
            prefix_width=0 if classes else int(found[LEARNED].shape[1]),
            frame=PromptFrame("bare", blank=file.pieces - 1 if classes else 0, without="blank" if classes else "slots"),
            block_rows=2 * settings.together,
        )
    except ValueError as error:
        raise ModelError(f"{path} does not fit: {error}") from error


def _heads_and_layers(file: LlamaGenFile, width: int, settings: LlamaGenImport) -> tuple[int, int]:
    """The heads, which do not show in the weights, and the layers, of which the last ones may be lost."""
    layers = sorted({int(match[1]) for key in file.tensors if isinstance(key, str) and (match := LAYER.match(key))})
    heads, depth = PUBLISHED.get(width, (None, None))
    heads, depth = settings.heads or heads, settings.layers or depth
    if heads is None or depth is None:
        raise ModelError(f"{file.path} is {width} wide, as no published model: say its --heads and --layers")
    if layers != [*range(depth)]:
        raise ModelError(f"{file.path} does not fit: it has {len(layers)} layers, and a model that is {width} wide has "
                         f"{depth} (or say --layers)")  # fmt: skip
    return heads, depth


def check_llamagen(file: LlamaGenFile, config: TransformerConfig) -> None:
    """Raises `ModelError` that names the tensors which are missing, unexpected, of another shape or damaged."""
    width, hidden, codes = config.width, config.hidden_width, config.num_image_codes
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (codes, width), "norm.weight": (width,), "output.weight": (codes, width),
    }  # fmt: skip
    if file.draws == "classes":
        shapes[CLASSES] = (config.num_text_pieces, width)
    else:
        shapes |= {LEARNED: (config.num_text_pieces, config.prefix_width)}
        shapes |= {FIRST: (width, config.prefix_width), SECOND: (width, width)}
    for layer in range(config.depth):
        start = f"layers.{layer}."
        shapes |= {f"{start}{norm}.weight": (width,) for norm in ("attention_norm", "ffn_norm")}
        shapes |= {f"{start}feed_forward.{name}.weight": (hidden, width) for name in ("w1", "w3")}
        shapes[f"{start}feed_forward.w2.weight"] = (width, hidden)
        shapes[f"{start}attention.wqkv.weight"] = (3 * width, width)
        shapes[f"{start}attention.wo.weight"] = (width, width)
    check_tensors(file.tensors, shapes, file.path)


def write_llamagen(file: LlamaGenFile, config: TransformerConfig, folder: Path) -> str:
    """Write the checked transformer to the new part `folder`, tensor by tensor; returns its content hash."""
    found = file.tensors
    dtype = common_dtype(found, file.path)
    embed = Made((config.vocabulary.padded_size, config.width), dtype, lambda: _embedding(file, config))
    tensors: dict[str, Tensor | Made] = {
        "embed.weight": embed, "norm.weight": found["norm.weight"], "head.weight": found["output.weight"],
    }  # fmt: skip
    if file.draws == "captions":
        tensors |= {"feature_map.first": found[FIRST], "feature_map.second": found[SECOND]}
    for layer in range(config.depth):
        start, block = f"layers.{layer}.", f"blocks.{layer}."
        tensors[f"{block}attention_norm.weight"] = found[f"{start}attention_norm.weight"]
        tensors[f"{block}mlp_norm.weight"] = found[f"{start}ffn_norm.weight"]
        tensors[f"{block}attention.qkv.weight"] = _halved(found[f"{start}attention.wqkv.weight"], config, dtype)
        tensors[f"{block}attention.project.weight"] = found[f"{start}attention.wo.weight"]
        tensors[f"{block}mlp.expand.weight"] = _stacked(
            [found[f"{start}feed_forward.{name}.weight"] for name in ("w1", "w3")], dtype
        )
        tensors[f"{block}mlp.project.weight"] = found[f"{start}feed_forward.w2.weight"]
    return stream_part(folder, config, tensors)


def _stacked(parts: list[Tensor], dtype: torch.dtype) -> Made:
    return Made((sum(map(len, parts)), parts[0].shape[1]), dtype, lambda: torch.cat(parts))


def _halved(qkv: Tensor, config: TransformerConfig, dtype: torch.dtype) -> Made:
    """q, k and v with the pairs of q and k in our order."""

    def make() -> Tensor:
        q, k, v = qkv.chunk(3)
        pairs = [x.view(config.heads, -1, 2, config.width).transpose(1, 2).reshape(x.shape) for x in (q, k)]
        return torch.cat([*pairs, v])

    return Made(tuple(qkv.shape), dtype, make)


def _embedding(file: LlamaGenFile, config: TransformerConfig) -> Tensor:
    """[V, D]: the codes' vectors; those of the classes, or what is made of the learned ones; zeros."""
    found, texts = file.tensors, config.vocabulary.text_range
    codes = found["tok_embeddings.weight"]
    embed = torch.zeros(config.vocabulary.padded_size, config.width, dtype=codes.dtype)
    embed[: len(codes)] = codes
    if file.draws == "classes":
        embed[texts.start : texts.stop] = found[CLASSES]
    else:
        learned, first, second = (found[key].float() for key in (LEARNED, FIRST, SECOND))
        embed[texts.start : texts.stop] = project_prompt(learned, first, second).to(embed.dtype)
    return embed


def import_vq16(path: Path, folder: Path) -> tuple[VQ16Config, str]:
    """Convert LlamaGen's picture tokenizer to the new part `folder`; returns its config and content hash."""
    found = read_state(path)
    config = vq16_config(found, "", "original", path)
    return config, stream_part(folder, config, converted(found, vq16_sources(config, "", "original"), path))
