"""Tiny models of Emu3 with random weights, as transformers makes and saves them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.helpers.janus import write_byte_tokenizer

MARKS = ("<|extra_203|>", "<|image start|>", "<|image token|>", "<|extra_200|>", "<image>", "<|endoftext|>")
FIRST, CODES = 264, 48  # the id of code 0, behind 256 bytes and the marks, with room between
PIECES = FIRST + CODES
END = 256 + MARKS.index("<|extra_200|>")
PROMPT = "一只柴犬 in a hat"


def make_emu3(seed: int = 0, shuffled: bool = False) -> Any:
    """transformers' model: 2 layers, 64 wide, heads that share keys, pictures of 8 px and 4 x 4 codes of 48.

    `shuffled`: the ids of the codes are in no order.
    """
    from transformers import Emu3Config, Emu3ForConditionalGeneration
    from transformers.models.emu3.configuration_emu3 import Emu3TextConfig, Emu3VQVAEConfig

    text = Emu3TextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=PIECES, max_position_embeddings=512, pad_token_id=261, bos_token_id=256, eos_token_id=5,
        attention_dropout=0.0,
    )  # fmt: skip
    vq = Emu3VQVAEConfig(
        codebook_size=CODES, embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1, 2],
        num_res_blocks=1, attn_resolutions=[1], hidden_size=64,
    )  # fmt: skip
    ids = torch.arange(FIRST, PIECES)
    if shuffled:
        ids = ids[torch.randperm(CODES, generator=torch.Generator().manual_seed(1))]
    named = {f"<|visual token {code:06d}|>": int(one) for code, one in enumerate(ids)}
    named |= {mark: 256 + place for place, mark in enumerate(MARKS)}
    torch.manual_seed(seed)
    model = Emu3ForConditionalGeneration(Emu3Config(text_config=text, vq_config=vq, vocabulary_map=named)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # untrained logits are almost flat, and ties would hide mistakes
            if "vqmodel" not in name and parameter.ndim > 1:
                parameter.mul_(6.0)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return model


def save_emu3(model: Any, folder: Path, **options: Any) -> Path:
    """The folder that transformers saves, with a text tokenizer."""
    model.save_pretrained(folder, **options)
    write_byte_tokenizer(folder / "tokenizer.json", MARKS)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "emu3"
    return folder


def guided_codes(model: Any, row: Sequence[int], other: Sequence[int], guidance: float, side: int = 4) -> list[int]:
    """The codes that transformers draws greedily after `row`, guided away from `other`, ends of rows forced."""
    first, ids = len(row), sorted(model.vocabulary_mapping.image_tokens)

    def allowed(batch: int, tokens: torch.Tensor) -> list[int]:
        return [END] if (len(tokens) - first) % (side + 1) == side else ids

    drawn = model.generate(
        torch.tensor([list(row)]), attention_mask=torch.ones(1, first, dtype=torch.int64),
        negative_prompt_ids=torch.tensor([list(other)]), negative_prompt_attention_mask=torch.ones(1, len(other)),
        guidance_scale=guidance, do_sample=False, max_new_tokens=side * (side + 1), prefix_allowed_tokens_fn=allowed,
    )  # fmt: skip
    places = drawn[0, first:].view(side, side + 1)
    assert bool((places[:, -1] == END).all())
    return [model.vocabulary_mapping.bpe2img[one] for one in places[:, :-1].flatten().tolist()]
