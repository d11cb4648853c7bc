"""Golden files of CogView's published code (`tests/golden/cogview`), and models in its layout read from them."""

from __future__ import annotations

from pathlib import Path

import torch

from generation.cogview.importing import import_generator
from generation.transformer.model import Transformer
from vqvae.storage.parts import load_part

GOLDEN = Path(__file__).parents[1] / "golden" / "cogview"


def load_generator(folder: Path, name: str) -> Transformer:
    import_generator(
        GOLDEN / "transformer" / name, folder / "part", num_image_codes=64, num_text_pieces=100,
        tokenizer_hash="t", text_hash="x", heads=4,
    )  # fmt: skip
    return load_part(Transformer, folder / "part").float()


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
