"""The original BriVL's outputs, its published layout, and the pictures and texts that they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "brivl"


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def checkpoint() -> dict[str, dict[str, Tensor]]:
    """The published layout, with what extraction does not use."""
    weights = arrays("query.npz")
    weights["imgencoder.backbone.classifier.weight"] = torch.zeros(1000, 64)
    weights["textencoder.backbone.bert.embeddings.position_ids"] = torch.arange(64)[None]
    weights["imgencoder_mom.backbone.conv_stem.weight"] = torch.zeros(8, 3, 3, 3)
    return {"learnable": weights}


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / "example.jsonl").read_text().splitlines()]


def pictures() -> list[Image.Image]:
    return [Image.open(GOLDEN / record["image_id"]) for record in records()]


def texts() -> list[str]:
    return [dict(record["sentences"])["sur_text"] for record in records()]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
