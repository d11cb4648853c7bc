"""Tiny models in Emu3's first layout, with random weights, and golden files of its code (`tests/golden/emu3`)."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.llamagen import random_tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "emu3"
# pieces, from 256 on; one of them cannot be joined from two others
RANKS = [bytes([byte]) for byte in range(256)]
RANKS += [piece.encode() for piece in ("re", " a", "red", "柴"[:1], "ed", "aa", "aaa", " red", "apple", "图")]
MARKS = ["<|image token|>", "<|image start|>", "<|image end|>"]
CODES = 48
BEGIN, END = (len(RANKS) + 3 + extra for extra in (203, 200))  # <|extra_203|>, <|extra_200|>
IMAGE = len(RANKS) + 3 + 205
FIRST = IMAGE + len(MARKS)  # the id of code 0
FIELDS: dict[str, Any] = {
    "model_type": "Emu3", "vocab_size": FIRST + CODES, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "attention_dropout": 0.0, "rope_scaling": None,
}  # fmt: skip
PICTURE_FIELDS: dict[str, Any] = {
    "model_type": "Emu3VisionVQ", "codebook_size": CODES, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1,
    "attn_resolutions": [1],
}  # fmt: skip


def first_weights(shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Numbers that depend on the keys alone."""
    tensors = {key: random_tensor(f"emu3.{key}", *shape) for key, shape in shapes.items()}
    for key, tensor in tensors.items():
        if key.endswith("running_var"):
            tensor.abs_().add_(0.5)
        elif "embed_tokens" in key or "q_proj" in key or "k_proj" in key:
            tensor.mul_(4.0)  # untrained logits are almost flat, and ties would hide mistakes
        elif key.endswith("conv_out.weight"):
            tensor.mul_(10.0 if key.startswith("encoder") else 3.0)  # so are pictures, and their codes are few
    return tensors


def golden() -> dict[str, Tensor]:
    return dict(load_file(GOLDEN / "golden.safetensors"))


def save_first_layout(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """The folders of a model and of its picture tokenizer, as they are published."""
    keys = json.loads((GOLDEN / "keys.json").read_text())
    model, pictures = folder / "Emu3-Gen", folder / "Emu3-VisionTokenizer"
    for path, kind, fields in ((model, "text", FIELDS), (pictures, "pictures", PICTURE_FIELDS)):
        path.mkdir(parents=True)
        tensors = {key: tensor.to(dtype) for key, tensor in first_weights(keys[kind]).items()}
        if kind == "pictures":
            tensors["encoder.time_res_stack.0.norm1.num_batches_tracked"] = torch.tensor(3)
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(fields))
    lines = (b"%s %d" % (base64.b64encode(piece), rank) for rank, piece in enumerate(RANKS))
    (model / "emu3.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    names = [*MARKS, *(f"<|visual token {code:06d}|>" for code in range(CODES))]
    (model / "emu3_vision_tokens.txt").write_text("\n".join(names) + "\n")
    return model, pictures
