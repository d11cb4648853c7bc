"""Rows that draw or describe, padded and packed, for tiny transformers."""

from __future__ import annotations

import random

import torch

from generation.rows.describe import caption_row
from generation.rows.draw import training_row
from generation.rows.row import Row, RowBatch, collate, pack
from generation.transformer.config import TransformerConfig

SIZES = {"num_image_codes": 32, "num_text_pieces": 70, "width": 32, "depth": 2, "heads": 2, "max_text": 9}
PRESETS = {
    "modern": TransformerConfig.modern(**SIZES, grid=(4, 4)),
    "cogview": TransformerConfig.cogview(**SIZES, grid=(4, 4)),
    "pb_relax": TransformerConfig.cogview(**SIZES, grid=(4, 4), pb_relax=8.0),
    "sparse": TransformerConfig.cogview(**SIZES, grid=(4, 4), sparse_window=2, sparse_windows=2, sparse_pivots=3),
}


def rows_of(config: TransformerConfig, describe: bool = False, count: int = 5) -> list[Row]:
    rng = random.Random(0)
    rows = []
    for index in range(count):
        codes = torch.randint(32, config.grid, generator=torch.Generator().manual_seed(index))
        texts = [[rng.randrange(70) for _ in range(rng.randrange(10))] for _ in range(3)]
        if describe:
            rows.append(caption_row(config.vocabulary, texts, codes, config.max_text, config.position_kind))
        else:
            rows.append(training_row(config.vocabulary, texts[0], codes, config.max_text, config.position_kind))
    return rows


def both(config: TransformerConfig, describe: bool = False) -> tuple[RowBatch, RowBatch]:
    rows = rows_of(config, describe)
    return collate(config.vocabulary, rows, 0.3), pack(config.vocabulary, rows, 0.3)
