"""A text tokenizer of tiktoken's kind as a tokenizer.json of Hugging Face's tokenizers, with the same pieces.

A file of ranks has a piece a line, in base64, and its number: text is split by a pattern, and in each part the two
neighbours whose piece has the lowest number are joined until none are left. A tokenizer.json lists such pairs in the
order in which they are joined.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.text import TextError


def read_ranks(path: Path) -> dict[bytes, int]:
    """The pieces of a file of ranks. Raises `TextError` for a file that is missing or holds anything else."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise TextError(f"no text tokenizer at {path}: it comes with the weights") from error
    ranks: dict[bytes, int] = {}
    try:
        for line in filter(None, (line.strip() for line in lines)):
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise TextError(f"{path} is damaged: its lines are no pieces with their numbers") from error
    bytes_there = all(bytes([byte]) in ranks for byte in range(256))
    if sorted(ranks.values()) != list(range(len(ranks))) or not bytes_there:
        raise TextError(f"{path} is damaged: its pieces are not numbered from 0 on, or a byte is missing")
    return ranks


def ranked_tokenizer(ranks: Mapping[bytes, int], pattern: str, marks: Sequence[str]) -> dict[str, Any]:
    """The content of a tokenizer.json: the pieces of `ranks` in texts (in NFC) split by `pattern`, `marks` behind."""
    letters = _letters()
    spelt = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": len(ranks) + place, "content": mark, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for place, mark in enumerate(marks)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": True,  # a part that is a piece is that piece, however it would be joined
            "vocab": {spelt[piece]: rank for piece, rank in ranks.items()},
            "merges": [[spelt[first], spelt[second]] for first, second in _pairs(ranks)],
        },
    }  # fmt: skip


def _pairs(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All pairs of pieces that make up a piece, in the order of its number, and where they are several of theirs."""
    pairs = []
    for piece in sorted(ranks, key=ranks.__getitem__):
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        known = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        pairs += sorted(known, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    return pairs


def _letters() -> list[str]:
    """The letter that stands for each byte in a tokenizer.json: itself where it can be seen, else one from 256 on."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(hidden)) for byte in range(256)]
