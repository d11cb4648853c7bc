"""Golden files of CogView's published code (`tests/golden/cogview`), and models in its layout read from them."""

from __future__ import annotations

from pathlib import Path

import sentencepiece
import torch

from generation.cogview.importing import import_generator
from generation.transformer.model import Transformer
from mmwudao.cli.app import run
from vqvae.storage.parts import load_part

CAPTIONS = ["red heart", "a red apple", "the quick brown fox jumps over the lazy dog", "0123456789", "sleeping face"]
GOLDEN = Path(__file__).parents[1] / "golden" / "cogview"


def imported_model(folder: Path) -> Path:
    """The golden checkpoints as `mmwudao import cogview` makes a model of them, in `folder`."""
    prefix = folder / "text"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_prefix=str(prefix), vocab_size=100, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    parts = {"tokenizer": GOLDEN / "vqvae" / "vqvae.pt", "generator": GOLDEN / "transformer" / "ckpt"}
    options = {**parts, "text-model": f"{prefix}.model", "out": folder / "cogview", "heads": 4, "image-size": 64}
    assert (
        run(["import", "cogview", *(str(part) for key, value in options.items() for part in (f"--{key}", value))]) == 0
    )
    return folder / "cogview"


def load_generator(folder: Path, name: str) -> Transformer:
    import_generator(
        GOLDEN / "transformer" / name, folder / "part", num_image_codes=64, num_text_pieces=100,
        tokenizer_hash="t", text_hash="x", heads=4,
    )  # fmt: skip
    return load_part(Transformer, folder / "part").float()


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
