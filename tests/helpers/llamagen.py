"""Tiny models in LlamaGen's published layout, with random weights, and golden files of its code (`tests/golden`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.janus import write_byte_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "llamagen" / "golden.safetensors"
WIDTH, DEPTH, HEADS, MLP_WIDTH, CODES = 64, 2, 4, 256, 48
CLASSES, CAPTION_WIDTH, CAPTION_SLOTS = 10, 24, 120
MULTIPLIERS, CODE_DIM, LATENT = (1, 1), 8, 32  # of the picture tokenizer, which is 128 wide at least
PROMPTS = {"a red fox": 4, "two boats": 6, "fog": 1}  # and how many vectors each has


def random_tensor(name: str, *shape: int) -> Tensor:
    """Normal numbers that depend on the name alone, of the size that layers want; those of norms are near 1."""
    # NumPy promises never to change this generator
    numbers = numpy.random.RandomState(crc32(name.encode())).standard_normal(shape).astype("float32")
    if "norm" in name:
        return torch.from_numpy(numbers) * 0.1 + float(name.endswith("weight"))
    fan_in = int(numpy.prod(shape[1:])) if len(shape) > 1 else 100
    return torch.from_numpy(numbers) / fan_in**0.5


def transformer_weights(kind: str) -> dict[str, Tensor]:
    """The state dict of a transformer: "c2i", which draws classes, or "t2i", which draws captions."""
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (CODES, WIDTH),
        "norm.weight": (WIDTH,),
        "output.weight": (CODES, WIDTH),
    }
    if kind == "c2i":
        shapes["cls_embedding.embedding_table.weight"] = (CLASSES + 1, WIDTH)
    else:
        shapes["cls_embedding.uncond_embedding"] = (CAPTION_SLOTS, CAPTION_WIDTH)
        shapes["cls_embedding.cap_proj.fc1.weight"] = (WIDTH, CAPTION_WIDTH)
        shapes["cls_embedding.cap_proj.fc2.weight"] = (WIDTH, WIDTH)
    for layer in range(DEPTH):
        start = f"layers.{layer}."
        shapes |= {
            f"{start}attention.wqkv.weight": (3 * WIDTH, WIDTH),
            f"{start}attention.wo.weight": (WIDTH, WIDTH),
            f"{start}feed_forward.w1.weight": (MLP_WIDTH, WIDTH),
            f"{start}feed_forward.w3.weight": (MLP_WIDTH, WIDTH),
            f"{start}feed_forward.w2.weight": (WIDTH, MLP_WIDTH),
            f"{start}attention_norm.weight": (WIDTH,),
            f"{start}ffn_norm.weight": (WIDTH,),
        }
    tensors = {name: random_tensor(f"{kind}.{name}", *shape) for name, shape in shapes.items()}
    # untrained logits are almost flat, and ties would hide mistakes
    return {name: tensor * (4.0 if "embed" in name or "wqkv" in name else 1.0) for name, tensor in tensors.items()}


def caption_vectors() -> dict[str, Tensor]:
    """For each prompt its vectors [n, C]."""
    return {text: random_tensor(f"vectors.{text}", n, CAPTION_WIDTH) * 4 for text, n in PROMPTS.items()}


def tokenizer_weights() -> dict[str, Tensor]:
    """The state dict of a picture tokenizer: two levels, 2 px a code, 48 codes."""
    widths = [128 * multiplier for multiplier in MULTIPLIERS]
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def residual(name: str, before: int, after: int) -> None:
        layer(f"{name}.norm1", before)
        layer(f"{name}.conv1", after, before, 3, 3)
        layer(f"{name}.norm2", after)
        layer(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            layer(f"{name}.nin_shortcut", after, before, 1, 1)

    def attention(name: str, width: int) -> None:
        layer(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", width, width, 1, 1)

    for side, order, blocks in (("encoder", widths, 2), ("decoder", widths[::-1], 3)):
        before = order[0] if side == "decoder" else widths[0]
        coarsest = 0 if side == "decoder" else len(order) - 1
        for level, width in enumerate(order):
            start = f"{side}.conv_blocks.{level}"
            for block in range(blocks):
                residual(f"{start}.res.{block}", before, width)
                before = width
                if level == coarsest:
                    attention(f"{start}.attn.{block}", width)
            if level != len(order) - 1:
                layer(f"{start}.{'downsample' if side == 'encoder' else 'upsample'}.conv", width, width, 3, 3)
        for place in (0, 2):
            residual(f"{side}.mid.{place}", widths[-1], widths[-1])
        attention(f"{side}.mid.1", widths[-1])
        layer(f"{side}.norm_out", order[-1])
    layer("encoder.conv_in", widths[0], 3, 3, 3)
    layer("encoder.conv_out", LATENT, widths[-1], 3, 3)
    layer("decoder.conv_in", widths[-1], LATENT, 3, 3)
    layer("decoder.conv_out", 3, widths[0], 3, 3)
    layer("quant_conv", CODE_DIM, LATENT, 1, 1)
    layer("post_quant_conv", LATENT, CODE_DIM, 1, 1)
    shapes["quantize.embedding.weight"] = (CODES, CODE_DIM)
    return {name: random_tensor(f"vq.{name}", *shape) for name, shape in shapes.items()}


def write_checkpoints(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Path]:
    """The files as they are published: the weights under a key of a pickle, beside other things."""
    folder.mkdir(exist_ok=True)
    paths = {"c2i": folder / "c2i_B_256.pt", "t2i": folder / "t2i_XL_stage1_256.pt", "vq": folder / "vq_ds16_t2i.pt"}
    for kind, path in paths.items():
        tensors = tokenizer_weights() if kind == "vq" else transformer_weights(kind)
        content: dict[str, Any] = {"model": {name: tensor.to(dtype) for name, tensor in tensors.items()}}
        if kind == "vq":
            content["model"]["quantize.codebook_used"] = torch.zeros(7)
        torch.save(content | {"steps": 3}, path)
    save_file(caption_vectors(), folder / "vectors.safetensors")
    return paths | {"vectors": folder / "vectors.safetensors"}


def golden() -> dict[str, Tensor]:
    return dict(load_file(GOLDEN))


def write_t5(folder: Path) -> Any:
    """A tiny text encoder as transformers saves it, with a tokenizer whose pieces are bytes; returns the model."""
    from transformers import T5Config, T5ForConditionalGeneration

    untied: Any = {"tie_word_embeddings": False, "decoder_start_token_id": 0}
    config = T5Config(
        vocab_size=320, d_model=CAPTION_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu", **untied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    write_byte_tokenizer(folder / "tokenizer.json", ("</s>", "<pad>"))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "t5"
    return model
