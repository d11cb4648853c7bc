"""Emu3 as BAAI published it first: the text's pieces in tiktoken's file, and the picture tokenizer in another folder.

The language model's keys are LLaMA's; those of the picture tokenizer are mapped here to the names of our modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.ranked_pieces import ranked_tokenizer, read_ranks
from vqvae.storage.folders import read_object
from vqvae.storage.parts import ModelError

RANKS, MARKS = "emu3.tiktoken", "emu3_vision_tokens.txt"
# of `Emu3Tokenizer`
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FIRST_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
# a field of the first picture tokenizer's config.json -> that of transformers'
FIELDS = {
    "ch": "base_channels", "ch_mult": "channel_multiplier", "z_channels": "latent_channels",
    "double_z": "double_latent", "num_res_blocks": "num_res_blocks", "attn_resolutions": "attn_resolutions",
    "codebook_size": "codebook_size", "embed_dim": "embed_dim", "in_channels": "in_channels",
    "out_channels": "out_channels", "temporal_downsample_factor": "temporal_downsample_factor",
}  # fmt: skip
# a part of the name of one of our modules -> of the first layout's
NAMES = {
    r"\b(down|up)_block\.\1\b": r"\1",
    r"\bmiddle_block\.attn_norm\b": "mid.attn_1.norm",
    r"\bmiddle_block\b": "mid",
    r"\battn_norms\.(\d+)\b": r"attn.\1.norm",
    r"\b([qkv])_proj\b": r"\1",
    r"\bout_proj\b": "proj_out",
}


def first_text(folder: Path) -> dict[str, Any]:
    """The content of a tokenizer.json with the pieces of the folder's files.

    Raises `TextError` (a `ValueError`) and `ModelError` for files that are missing or damaged.
    """
    return ranked_tokenizer(read_ranks(folder / RANKS), PATTERN, _marks(folder))


def first_vocabulary(folder: Path) -> dict[str, int]:
    """The marks and the codes of pictures by their names, as a vocabulary_map has them."""
    first = len(read_ranks(folder / RANKS))
    return {mark: first + place for place, mark in enumerate(_marks(folder))}


def first_picture_fields(folder: Path) -> dict[str, Any]:
    """The picture tokenizer's config.json with the fields of transformers'. Raises `ModelError` for another's."""
    path = folder / "config.json"
    record = read_object(path)
    kind = record.get("model_type")
    if kind != "Emu3VisionVQ":
        raise ModelError(
            f"{path} describes no picture tokenizer of Emu3's first layout: its model_type is {kind!r}, not "
            "Emu3VisionVQ"
        )
    fields = {ours: record[name] for name, ours in FIELDS.items() if name in record}
    return fields | {"hidden_size": _widest(fields)}


def first_name(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The key and the shape of one of the picture tokenizer's tensors, by our module's."""
    convolution = re.search(r"_proj\.weight$", name) is not None  # attention is of 1x1 convolutions there
    for ours, theirs in NAMES.items():
        name = re.sub(ours, theirs, name)
    return name, (*shape, 1, 1) if convolution else shape


def _widest(fields: Mapping[str, Any]) -> Any:
    """The width of attention, which the first layout does not say: that of the coarsest level."""
    channels, multipliers = fields.get("base_channels", 256), fields.get("channel_multiplier", [1, 2, 2, 4])
    known = isinstance(channels, int) and isinstance(multipliers, list) and multipliers
    return channels * multipliers[-1] if known and isinstance(multipliers[-1], int) else None


def _marks(folder: Path) -> list[str]:
    path = folder / MARKS
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ModelError(f"{path} is missing: it names the codes of pictures") from error
    except ValueError as error:
        raise ModelError(f"{path} is damaged: it is no text") from error
    marks = [*FIRST_MARKS, *filter(None, (line.strip() for line in lines))]
    if len(set(marks)) != len(marks):
        raise ModelError(f"{path} is damaged: it names a mark twice")
    return marks
