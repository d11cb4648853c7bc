"""Tiny models in Janus' published layouts, with random weights, as transformers makes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MARKS = ("<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>", "<end_of_image>", "<|User|>", "<|Assistant|>")
PIECES = 320  # of the text, more than the tokenizer has: as in the published models
BOS, PAD, BEGIN = 256, 257, 258
PROMPT = "一只柴犬 in a hat"


def write_byte_tokenizer(path: Path, marks: tuple[str, ...] = MARKS) -> None:
    """A tokenizer.json whose pieces are bytes and `marks`, those of Janus-Pro if no others are given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(marks))
    tokenizer.save(str(path))


def make_janus(kv_heads: int = 4, seed: int = 0) -> Any:
    """transformers' model: 2 layers, 64 wide, pictures of 8 px and 4 x 4 codes of 48."""
    from transformers import JanusConfig, JanusForConditionalGeneration
    from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig
    from transformers.models.llama.configuration_llama import LlamaConfig

    text = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads,
        vocab_size=PIECES, max_position_embeddings=512, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=5,
    )  # fmt: skip
    vision = JanusVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=2, mlp_ratio=2.0,
        projection_dim=64, num_image_tokens=16,
    )  # fmt: skip
    vq = JanusVQVAEConfig(
        embed_dim=8, num_embeddings=48, latent_channels=32, base_channels=32, channel_multiplier=[1, 2],
        num_res_blocks=1, projection_dim=64, image_token_embed_dim=64,
    )  # fmt: skip
    torch.manual_seed(seed)
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=vq, tie_word_embeddings=False)
    model = JanusForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # untrained logits are almost flat, and ties would hide mistakes
            if parameter.ndim > 1 and ("vqmodel" not in name or ".quant_conv" in name):
                parameter.mul_(6.0)
            elif parameter.ndim == 1 and "norm" not in name:
                parameter.normal_(std=0.1)
    return model


def save_janus(model: Any, folder: Path, **options: Any) -> Path:
    """The folder that transformers saves, with a text tokenizer."""
    model.save_pretrained(folder, **options)
    write_byte_tokenizer(folder / "tokenizer.json")
    return folder


def original_key(key: str) -> str | None:
    """The key of the original's layout for one of transformers'; None for what it calls otherwise and nobody reads."""
    renamed = {
        r"model\.generation_embeddings\.": "gen_embed.",
        r"model\.generation_aligner\.fc1\.": "gen_aligner.layers.0.",
        r"model\.generation_aligner\.hidden_layers\.0\.": "gen_aligner.layers.2.",
        r"model\.generation_head\.proj_out\.": "gen_head.output_mlp_projector.",
        r"model\.generation_head\.vision_head\.": "gen_head.vision_head.",
        r"model\.language_model\.": "language_model.model.",
        r"lm_head\.": "language_model.lm_head.",
    }
    for pattern, replacement in renamed.items():
        if re.match(pattern, key):
            return re.sub(f"^{pattern}", replacement, key)
    if not key.startswith("model.vqmodel."):
        return key.removeprefix("model.") if key.startswith("model.vision_model.") else None
    key = re.sub(r"\.(down|up)\.(\d)\.", r".conv_blocks.\2.", key.replace("model.vqmodel.", "gen_vision_model."))
    key = key.replace(".block.", ".res.").replace(".mid.block_1.", ".mid.0.")
    return key.replace(".mid.attn_1.", ".mid.1.").replace(".mid.block_2.", ".mid.2.")


def as_original(source: Path, folder: Path) -> Path:
    """The same weights and sizes in the layout of the original."""
    folder.mkdir()
    found = load_file(source / "model.safetensors")
    tensors = {ours: tensor for key, tensor in found.items() if (ours := original_key(key)) is not None}
    tensors["gen_vision_model.quantize.codebook_used"] = torch.zeros(7, dtype=torch.int64)
    tensors["aligner.layers.0.weight"] = torch.zeros(3, 3)
    record = json.loads((source / "config.json").read_text())
    language = {key: value for key, value in record["text_config"].items() if key != "rms_norm_eps"}
    side = record["vision_config"]["image_size"]
    config = {
        "model_type": "multi_modality",
        "language_config": language,
        "vision_config": {"cls": "CLIPVisionTower", "params": {"image_size": side}},
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 48, "n_embed": 8}},
    }
    write_janus(folder, tensors, config)
    return folder


def write_janus(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    write_byte_tokenizer(folder / "tokenizer.json")


def guided_codes(model: Any, ids: list[int], guidance: float) -> list[int]:
    """What transformers draws greedily after the row `ids`."""
    tokens = torch.tensor([ids])
    model.generation_config.generation_kwargs = {"boi_token_id": BEGIN}
    model.generation_config.pad_token_id, model.generation_config.bos_token_id = PAD, BOS
    drawn = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), generation_mode="image", guidance_scale=guidance,
        do_sample=False,
    )  # fmt: skip
    codes: list[int] = drawn[0].tolist()
    return codes
