"""Towers without training: a picture is its mean colour, a text the colour that it names first."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from data.sample import Caption, Sample
from data.text import TextTokenizer
from retrieval.towers.base import Tokens, Towers, unit
from retrieval.towers.ours import EmojiTowers, TowersConfig
from tests.conftest import CAPTIONS

COLOURS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "cyan": (0, 255, 255),
    "magenta": (255, 0, 255), "white": (255, 255, 255), "black": (0, 0, 0),
}  # fmt: skip
GERMAN = dict(zip(COLOURS, ("rot", "grün", "blau", "gelb", "türkis", "purpur", "weiß", "schwarz"), strict=True))


class ColourTowers(Towers):
    """Right about every plain colour; `noise` adds that much to all texts' features."""

    kind = "colour"
    embed_dim, image_size = 8, 8
    pixel_mean, pixel_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.project = torch.nn.Linear(3, 8, bias=False)
        torch.nn.init.orthogonal_(self.project.weight, generator=torch.Generator().manual_seed(0))
        self.noise = noise

    @property
    def scale(self):
        return torch.tensor(10.0)

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        rows = []
        for text in texts:
            named = [name for name in COLOURS if name in text or GERMAN[name] in text]
            rows.append(COLOURS[named[0]] if named else (127, 128, 129))
        return torch.tensor(rows) / 255

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return unit(self.project(pixels.mean(dim=(2, 3)) - 0.5))

    def encode_tokens(self, tokens: Tokens) -> torch.Tensor:
        assert isinstance(tokens, torch.Tensor)
        noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
        return unit(self.project(tokens - 0.5 + self.noise * noise))


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


@cache
def tiny_towers() -> EmojiTowers:
    """The architecture of the shipped towers, small, with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        text = TextTokenizer.train(CAPTIONS, Path(folder) / "text.model", vocab_size=400)
    torch.manual_seed(0)
    config = TowersConfig(
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
    return EmojiTowers(config, text).eval()
