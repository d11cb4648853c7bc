"""What `mmwudao info` tells of a model: its parts, and the memory that drawing with it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from data.framed_text import FramedTokenizer, ModelText
from data.named_prompts import NamedPrompts
from generation.cogview.rows import PRESETS, cogview_config
from generation.drawing.memory import plan_drawing
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from mmwudao.loading.devices import choose_dtype
from mmwudao.loading.loaded import ModelParts, load_parts
from mmwudao.loading.model_dir import OPTIONAL_PARTS, check_hash
from vqvae.model import VQVAEConfig
from vqvae.storage.blocks import bits_of, stored_numbers
from vqvae.storage.parts import stored_hash, without_weights
from vqvae.tokenizers import TokenizerConfig


def describe_model(model: str | Path, dtype: str = "auto") -> dict[str, Any]:
    """What `mmwudao info` prints: the parts of a model with sizes in bytes, parameter counts, dtypes and hashes.

    `memory` is what drawing takes (`generation.drawing.memory`) on a CPU and on a GPU. A name in
    `generation.cogview.rows.PRESETS` is described without weights. Raises `ModelError` as `load` does, `ValueError` for
    an unknown dtype.
    """
    if model in PRESETS and not Path(model).is_dir():
        return _describe_preset(str(model), dtype)
    loaded = load_parts(model)
    config, parts = loaded.config, _describe_parts(loaded)
    return {
        "name": config.name,
        "folder": str(loaded.folder),
        "image_size": config.image_size,
        "styles": config.styles,
        "languages": config.languages,
        "default_sampling": asdict(config.default_sampling),
        "model_hash": config.model_hash,
        "bytes": sum(part["bytes"] for part in parts.values()),
        "parts": parts,
        "memory": _plans(loaded.generator.config, loaded.tokenizer.config, dtype, loaded.encoder_bytes),
    }


def _describe_parts(loaded: ModelParts) -> dict[str, dict[str, Any]]:
    """What is told of each part; the optional ones are read here, to check their hashes."""
    folder, config = loaded.folder, loaded.config
    parts: dict[str, dict[str, Any]] = {}
    for name, module in (("tokenizer", loaded.tokenizer), ("generator", loaded.generator)):
        count = sum(parameter.numel() for parameter in module.parameters())
        parts[name] = {"parameters": count, "dtype": _dtype_name(module.state_dict())}
    for name in config.parts.keys() & set(OPTIONAL_PARTS):
        stored = folder / config.parts[name].path
        check_hash(folder, name, stored_hash(stored), config.parts[name].hash)
        tensors = load_file(stored / "model.safetensors")
        count = sum(stored_numbers(*item) for item in tensors.items())
        parts[name] = {"parameters": count, "dtype": _dtype_name(tensors)}
    parts["text"] = {"pieces": loaded.text.vocab_size, "dtype": _text_kind(loaded.text)}
    for name, part in config.parts.items():
        parts[name] |= {"hash": part.hash, "bytes": _size(folder / part.path)}
    return parts


def _text_kind(text: ModelText) -> str:
    if isinstance(text, NamedPrompts):
        return f"names of each {text.what}"
    return "tokenizer.json" if isinstance(text, FramedTokenizer) else "sentencepiece"


def _dtype_name(tensors: Mapping[str, torch.Tensor]) -> str:
    """The type that most numbers of the weights have; counters and the like are whole numbers."""
    counts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        if bits := bits_of(name):
            counts[f"{bits} bits"] += stored_numbers(name, tensor)
        elif tensor.is_floating_point():
            counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return counts.most_common(1)[0][0]


def _describe_preset(name: str, dtype: str) -> dict[str, Any]:
    config, tokenizer = cogview_config(name), VQVAEConfig.cogview()
    with without_weights():
        parameters = sum(parameter.numel() for parameter in Transformer(config).parameters())
    image_size = config.grid[0] * tokenizer.stride
    memory = _plans(config, tokenizer, dtype)
    return {"name": name, "image_size": image_size, "parameters": parameters, "memory": memory}


def _plans(
    config: TransformerConfig, tokenizer: TokenizerConfig, dtype: str, encoder: int = 0
) -> dict[str, dict[str, Any]]:
    plans = {}
    for device, usual in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        chosen = usual if dtype in ("auto", "int8") else choose_dtype(dtype, torch.device(device))
        plan = plan_drawing(config, tokenizer, chosen, device, eight_bits=dtype == "int8", encoder=encoder)
        named = "int8" if dtype == "int8" else str(chosen).removeprefix("torch.")
        plans[device] = {"dtype": named, **asdict(plan), "total": plan.total}
    return plans


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
