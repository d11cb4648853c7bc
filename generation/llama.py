"""LLaMA as transformers stores it: what Janus and Emu3 share in their config.json and their keys.

D width, K heads of keys, d head width, M width of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generation.transformer.config import TransformerConfig
from vqvae.storage.parts import ModelError
from vqvae.storage.published import Made

# a field that config.json leaves out has the default of its class in transformers; this is that of LlamaConfig
LLAMA: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
    "rope_scaling": None,
    "rope_theta": 10000.0,
}
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None}  # what is computed here


def read_language(record: Mapping[str, Any], path: Path, defaults: Mapping[str, Any] = LLAMA) -> dict[str, Any]:
    """The fields of a language model, out of the config.json at `path`.

    Raises `ModelError` for a value of another kind, and for what is not computed here.
    """
    known = {name: record.get(name, default) for name, default in defaults.items()}
    known["rope_theta"] = _rope_theta(record, path, defaults["rope_theta"])
    for name, value in known.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        wanted = defaults[name]
        if isinstance(wanted, int | float) and not isinstance(wanted, bool) and not number:
            raise ModelError(f"{path} has {name} = {value!r}, which is no number")
    for name, only in ONLY.items():
        if known[name] != only:
            raise ModelError(f"{path} has {name} = {known[name]!r}; only {only!r} is computed here")
    return known


def _rope_theta(record: Mapping[str, Any], path: Path, default: float) -> Any:
    """The base of the rotary positions: a field of its own, or with its kind in one object."""
    rope = record.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else rope
    if kind != "default":
        raise ModelError(f"{path} has rotary positions of the kind {kind!r}; only 'default' is computed here")
    return rope.get("rope_theta", record.get("rope_theta", default))


def llama_config(language: Mapping[str, Any], path: Path, needed: int, **own: Any) -> TransformerConfig:
    """The transformer of a language model's fields (`read_language`), and what the model has of its `own`.

    `needed` is how many places a row takes. Raises `ModelError` for a config.json that contradicts itself, or whose
    context is shorter.
    """
    try:
        config = TransformerConfig(
            width=language["hidden_size"],
            depth=language["num_hidden_layers"],
            heads=language["num_attention_heads"],
            kv_heads=language["num_key_value_heads"] or 0,
            norm="rmsnorm",
            norm_eps=language["rms_norm_eps"],
            mlp="swiglu",
            mlp_width=language["intermediate_size"],
            position="rotary_1d",
            rotary_base=language["rope_theta"],
            qk_norm=False,
            tie_embeddings=False,
            **own,
        )
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path} does not fit: {error}") from error
    if language["head_dim"] not in (None, config.head_width):
        raise ModelError(f"{path} says heads of {language['head_dim']}, and {config.head_width} make up the width")
    longest, (height, width) = language["max_position_embeddings"], config.grid
    if not isinstance(longest, int) or needed > longest:
        raise ModelError(
            f"{path} says a context of {longest} places; {height}x{width} codes and {config.max_text} pieces of text "
            f"take {needed}: say fewer (--max-text)"
        )
    return config


def llama_shapes(config: TransformerConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of the blocks and the norm behind them."""
    width, hidden, shared = config.width, config.hidden_width, config.key_heads * config.head_width
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}norm.weight": (width,)}
    for layer in range(config.depth):
        start = f"{prefix}layers.{layer}."
        shapes |= {f"{start}{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{start}self_attn.{name}_proj.weight": (width, width) for name in "qo"}
        shapes |= {f"{start}self_attn.{name}_proj.weight": (shared, width) for name in "kv"}
        shapes |= {f"{start}mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes[f"{start}mlp.down_proj.weight"] = (width, hidden)
    return shapes


def llama_tensors(
    found: Mapping[str, Any], config: TransformerConfig, prefix: str, dtype: torch.dtype
) -> dict[str, Tensor | Made]:
    """Our tensors of `llama_shapes`, of published ones that are checked."""

    def joined(start: str, names: tuple[str, ...]) -> Made:
        pieces = [found[f"{start}{name}_proj.weight"] for name in names]
        return Made((sum(len(piece) for piece in pieces), config.width), dtype, lambda: torch.cat(pieces))

    tensors: dict[str, Tensor | Made] = {"norm.weight": found[f"{prefix}norm.weight"]}
    for layer in range(config.depth):
        start, block = f"{prefix}layers.{layer}.", f"blocks.{layer}."
        tensors[f"{block}attention_norm.weight"] = found[f"{start}input_layernorm.weight"]
        tensors[f"{block}attention.qkv.weight"] = joined(f"{start}self_attn.", ("q", "k", "v"))
        tensors[f"{block}attention.project.weight"] = found[f"{start}self_attn.o_proj.weight"]
        tensors[f"{block}mlp_norm.weight"] = found[f"{start}post_attention_layernorm.weight"]
        tensors[f"{block}mlp.expand.weight"] = joined(f"{start}mlp.", ("gate", "up"))
        tensors[f"{block}mlp.project.weight"] = found[f"{start}mlp.down_proj.weight"]
    return tensors
