"""Codes of tiny pictures with captions that tell them, and the configuration of a tiny generator that learns them."""

import json
from pathlib import Path

import numpy
import torch

from data.codes import CodedSample
from data.sample import Caption, Sample
from data.shards import Manifest, ShardWriter, write_manifest
from data.text import TextTokenizer
from generation.rows.texts import CaptionMix
from generation.training.config import GeneratorDataConfig, GeneratorTrainConfig
from generation.training.matching import MatchTraining
from generation.transformer.config import TransformerConfig
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.storage.parts import save_part
from vqvae.training.config import LoopConfig

CODES = 16
COLOURS = {"zh": "红", "en": "red", "fr": "rouge", "de": "rot", "cs": "červená", "ja": "赤", "ko": "빨강"}


def sample(number: int, **changes) -> Sample:
    captions = {language: Caption(f"{word} {number % 8}", (word, "x", "y")) for language, word in COLOURS.items()}
    fields = {"family": "noto" if number % 2 else "openmoji", "base_concept": f"c{number % 8}", **changes}
    return Sample(f"s{number:03d}", b"", "png", captions, **fields)


def write_codes(folder: Path, splits: dict[str, list[CodedSample]], tokenizer: str = "cafe") -> Path:
    written = {}
    for split, coded in splits.items():
        with ShardWriter(folder, split) as writer:
            for item in coded:
                writer.write_members(item.sample.id, item.to_members())
        written[split] = writer.shards
    write_manifest(folder, Manifest("tiny", 16, written, {"tokenizer": tokenizer}))
    return folder


def coded(number: int) -> CodedSample:
    """Codes that are easy to guess: one code all over, which the caption's number tells, and one odd corner."""
    grid = numpy.full((4, 4), number % 8, numpy.uint16)
    grid[3, 3] = 8 + number % 8
    return CodedSample(sample(number), grid)


def write_workspace(folder: Path) -> Path:
    """A text tokenizer, an image tokenizer and codes of three splits."""
    TextTokenizer.train([c.name for n in range(8) for c in sample(n).captions.values()] * 5, folder / "text.model", 320)
    torch.manual_seed(0)
    vqvae = VQVAE(VQVAEConfig(channels=[4, 8], residual_blocks=0, code_dim=4, codebook_size=CODES))
    name = save_part(vqvae, folder / "tokenizer")
    splits = {"train": range(40), "test-family": range(40, 50), "test-concept": range(50, 55)}
    write_codes(folder / "codes", {split: [coded(n) for n in numbers] for split, numbers in splits.items()}, name)
    return folder


def make_config(
    workspace: Path, out: Path, data=None, model=None, captions=None, mix=None, match=None, **loop
) -> GeneratorTrainConfig:
    files = {"codes": str(workspace / "codes"), "text_model": str(workspace / "text.model")}
    sizes = {"num_image_codes": CODES, "width": 16, "depth": 1, "heads": 2, "max_text": 12}
    steps = {"steps": 6, "batch_size": 8, "learning_rate": 3e-3, "warmup": 2, "log_every": 1, "eval_every": 3}
    return GeneratorTrainConfig(
        data=GeneratorDataConfig(**{**files, **(data or {})}),
        captions=CaptionMix(**(captions or {})),
        model=TransformerConfig(**{**sizes, **(model or {})}),
        mix=mix or {"draw": 1.0},
        match=MatchTraining(**(match or {})),
        loop=LoopConfig(**{"out": str(out), "precision": "float32", "device": "cpu", **steps, **loop}),
    )


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def logged(out: Path, name: str) -> list[float]:
    return [record[name] for record in read_log(out) if name in record]
