"""Small towers for tests, and shards of plain colours that they can tell apart."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from data.sample import Caption, Sample
from data.shards import ShardWriter
from data.text import TextTokenizer
from retrieval.towers.multiscale import MultiScaleConfig, MultiScaleTowers
from tests.conftest import CAPTIONS
from tests.helpers.colour_towers import COLOURS, GERMAN, ColourTowers

__all__ = ["COLOURS", "GERMAN", "ColourTowers", "colour_sample", "tiny_towers", "write_shards"]


def colour_sample(name: str, family: str, shade: int = 0) -> Sample:
    """A square of one colour, a little darker or lighter by `shade`, captioned in English and German."""
    from io import BytesIO

    colour = tuple(min(255, max(0, c + (shade if c < 128 else -shade))) for c in COLOURS[name])
    buffer = BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return Sample(
        id=f"{family}-{name}",
        image=buffer.getvalue(),
        extension="png",
        captions={"en": Caption(f"{name} square", ("square", name)), "de": Caption(f"Quadrat, {GERMAN[name]}")},
        family=family,
        concept=name,
        base_concept=name,
    )


def write_shards(folder, families=("a", "b", "c", "d"), corrupt=False):
    """Write one shard a family, each with one picture of every colour (and `corrupt`: one broken picture)."""
    with ShardWriter(folder, "train", len(COLOURS) + corrupt) as writer:
        for k, family in enumerate(families):
            for name in COLOURS:
                writer.write(colour_sample(name, family, shade=k))
            if corrupt:
                writer.write(Sample(f"{family}-broken", b"no picture", "png", colour_sample("red", family).captions))
    return folder


@cache
def tiny_towers():
    """The architecture of the shipped towers, small, with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        text = TextTokenizer.train(CAPTIONS, Path(folder) / "text.model", vocab_size=400)
    torch.manual_seed(0)
    config = MultiScaleConfig(
        embed_dim=32,
        image_size=32,
        grids=[1, 2],
        head_width=16,
        head_heads=2,
        text_encoder={
            "model_type": "bert", "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        max_text=16,
        num_text_pieces=text.vocab_size,
        text_hash=text.content_hash,
    )  # fmt: skip
    return MultiScaleTowers(config, text).eval()
