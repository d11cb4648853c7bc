"""A smaller text encoder cut out of a larger one: fewer pieces, fewer layers, fewer positions; the weights stay."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer

from data.config import ConfigError
from data.records import parse_json
from retrieval.encoders.text_encoder import TextEncoder

# scripts of which every piece of one character is kept: letters, kana, Hangul, and the common Chinese characters
SCRIPTS = ((0x21, 0x17F), (0x2000, 0x206F), (0x3000, 0x30FF), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3))


def prune_text_encoder(
    encoder: TextEncoder, pieces: int, layers: Sequence[int], texts: Iterable[str], max_tokens: int = 64
) -> TextEncoder:
    """The encoder with `pieces` rows, the layers of these numbers (from 0), and `max_tokens` positions.

    Kept are the special pieces, the most frequent ones of `texts`, and single characters of our scripts. The tokenizer
    must be a Unigram one. Raises `ConfigError` for another tokenizer, and for layers that are not there.
    """
    config = encoder.config
    depth = len(encoder.transformer.encoder.layer)
    if not layers or min(layers) < 0 or max(layers) >= depth:
        raise ConfigError(f"layers are numbers from 0 to {depth - 1}, not {list(layers)}")
    kept = choose_pieces(encoder.tokenizer, pieces, texts)
    tokenizer = _pruned_tokenizer(parse_json(encoder.tokenizer.to_str()), kept)
    architecture = {
        **config.architecture,
        "vocab_size": len(kept),
        "num_hidden_layers": len(layers),
        "max_position_embeddings": max_tokens + (0 if config.architecture["model_type"] == "bert" else 2),
    }
    small = TextEncoder(
        replace(config, architecture=architecture, max_tokens=max_tokens, pad_token=kept.index(config.pad_token)),
        json.dumps(tokenizer, ensure_ascii=False).encode(),
    )
    large = encoder.transformer.state_dict()
    rows = {"embeddings.word_embeddings.weight": torch.tensor(kept)}
    new = {}
    for name, tensor in small.transformer.state_dict().items():
        source = name
        if name.startswith("encoder.layer."):
            number, rest = name.removeprefix("encoder.layer.").split(".", 1)
            source = f"encoder.layer.{layers[int(number)]}.{rest}"
        new[name] = large[source][rows[name]] if name in rows else large[source][: len(tensor)]
    small.transformer.load_state_dict(new)
    return small.eval()


def choose_pieces(tokenizer: Tokenizer, count: int, texts: Iterable[str]) -> list[int]:
    """Ids of `count` pieces, ascending: special ones, single characters of our scripts, and the most frequent."""
    record = parse_json(tokenizer.to_str())
    if record["model"]["type"] != "Unigram":
        raise ConfigError(f"only Unigram tokenizers can be pruned, not {record['model']['type']}")
    special = {token["id"] for token in record["added_tokens"]} | {record["model"]["unk_id"]}
    found: Counter[int] = Counter()
    for batch in _batches(texts, 1000):
        for encoding in tokenizer.encode_batch(batch):
            found.update(encoding.ids)
    vocabulary = [piece for piece, _ in record["model"]["vocab"]]
    singles = [index for index, piece in enumerate(vocabulary) if _single(piece)]
    # a character that no text uses comes behind the pieces that texts use twice
    for index in singles:
        found[index] += 1
    ranked = [index for index, _ in found.most_common() if index not in special]
    return sorted([*special, *ranked[: count - len(special)]])


def _single(piece: str) -> bool:
    character = piece.removeprefix("▁")
    return len(character) <= 1 and (not character or any(low <= ord(character) <= high for low, high in SCRIPTS))


def _batches(texts: Iterable[str], size: int) -> Iterable[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _pruned_tokenizer(record: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The tokenizer.json with the kept pieces alone; ids change to their places in `kept`."""
    places = {index: place for place, index in enumerate(kept)}
    model = record["model"]
    model["vocab"] = [model["vocab"][index] for index in kept]
    model["unk_id"] = places[model["unk_id"]]
    for token in record["added_tokens"]:
        token["id"] = places[token["id"]]
    for special in record["post_processor"]["special_tokens"].values():
        special["ids"] = [places[index] for index in special["ids"]]
    return record
