"""Untrained towers that see colours, for tests; apart from `tiny_towers`, whose imports take seconds."""

from __future__ import annotations

import torch

from retrieval.towers.base import Tokens, Towers, unit

COLOURS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "cyan": (0, 255, 255),
    "magenta": (255, 0, 255), "white": (255, 255, 255), "black": (0, 0, 0),
}  # fmt: skip
GERMAN = dict(zip(COLOURS, ("rot", "grün", "blau", "gelb", "türkis", "purpur", "weiß", "schwarz"), strict=True))


class ColourTowers(Towers):
    """Untrained towers: a picture is its mean colour, a text the colour that it names first, plus `noise`."""

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
