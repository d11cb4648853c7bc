"""Bits a hidden code: of a generator that fills holes, of one that draws row by row, and of the same by [MASK].

    python -m bench.quality.fill_bits --codes codes/emoji --model DIR [--fills GENERATOR] [--pictures 600]

Holes of each kind hide the same share of each picture. "fill" sees all that is kept and the holes before; "before" sees
all that comes before in raster order, hidden or not, and nothing behind; "masked" is "before" with [MASK] for what is
hidden, as rows with `code_mask` have it. --fills: the folder of a generator to fill with, if it is not the model's own.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from generation.rows.fill import with_holes
from generation.rows.holes import HoleKind, hidden_codes
from generation.rows.row import Row, collate
from generation.training.batches import HELD_OUT_BATCH, RowMaker
from generation.training.config import GeneratorTrainConfig
from generation.training.pairs import CodedPairs
from generation.transformer.model import Transformer
from mmwudao.pipeline import load
from vqvae.storage.parts import load_part

WAYS = ("fill", "before", "masked")
SPLITS = ("test-family", "test-concept")


def hidden_of(kind: str, grid: tuple[int, int], share: float, seed: str) -> Tensor:
    """The hidden codes (bool [h, w]): "middle" is a square in the middle."""
    if kind != "middle":
        return hidden_codes(grid, kind, share, random.Random(seed))  # type: ignore[arg-type]
    hidden = torch.zeros(grid, dtype=torch.bool)
    height, width = (round(side * share**0.5) for side in grid)
    top, left = (grid[0] - height) // 2, (grid[1] - width) // 2
    hidden[top : top + height, left : left + width] = True
    return hidden


def row_of(way: str, row: Row, hidden: Tensor, model: Transformer) -> Row:
    vocab = model.config.vocabulary
    holes = with_holes(vocab, row, hidden)
    if way == "fill":
        return holes
    tokens = holes.tokens.clone()
    if way == "masked":
        tokens[-hidden.numel() :][hidden.flatten()] = vocab.command("[MASK]")
    return replace(holes, tokens=tokens, levels=None)


@torch.inference_mode()
def hidden_bits(model: Transformer, rows: list[Row]) -> float:
    """The mean over rows of bits a hidden code; all rows hide as many."""
    total = 0.0
    for start in range(0, len(rows), HELD_OUT_BATCH):
        some = rows[start : start + HELD_OUT_BATCH]
        total += len(some) * float(model.loss(collate(model.config.vocabulary, some))["image_bits"])
    return total / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codes", type=Path, required=True)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--fills", type=Path)
    parser.add_argument("--pictures", type=int, default=600, help="of each split")
    parser.add_argument("--share", type=float, default=0.3, help="of the codes are hidden")
    arguments = parser.parse_args()
    pipe = load(arguments.model, device="cpu", dtype="float32")
    raster = pipe.generator
    filling = load_part(Transformer, arguments.fills).float() if arguments.fills else raster
    if not filling.config.fills:
        parser.error("the generator was not trained to fill holes: give one with --fills")
    maker = RowMaker(pipe.text, raster.config, GeneratorTrainConfig(), pipe.features)
    record: dict[str, dict[str, dict[str, float]]] = {}
    for split in SPLITS:
        pairs = CodedPairs(arguments.codes, split)
        count = min(arguments.pictures, len(pairs))
        pictures = [pairs.picture(k * len(pairs) // count) for k in range(count)]
        whole = [maker.kind("draw").held_out_row(one, maker.recipe, True) for one in pictures]
        record[split] = {}
        for kind in ("middle", *get_args(HoleKind)):
            hidden = [hidden_of(kind, pairs.grid, arguments.share, one.sample.id) for one in pictures]
            bits = {}
            for way in WAYS:
                model = filling if way == "fill" else raster
                rows = [row_of(way, row, mask, model) for row, mask in zip(whole, hidden, strict=True)]
                bits[way] = round(hidden_bits(model, rows), 4)
            record[split][kind] = bits
            told = "  ".join(f"{way} {value:.3f}" for way, value in bits.items())
            print(f"{split:14} {kind:10}  {told}  fill to before {bits['fill'] / bits['before'] - 1:+.1%}", flush=True)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
