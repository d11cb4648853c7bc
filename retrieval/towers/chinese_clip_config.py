"""The sizes of Chinese-CLIP (Yang et al. 2022, arXiv:2211.01335), and its published models. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.config import ConfigError
from data.options import check_options, option


@dataclass(frozen=True)
class ChineseClipConfig:
    """Sizes of both towers. `vision_layers` is one number for a ViT and four for a ResNet, without `patch_size`."""

    embed_dim: int = option(512, "numbers of a vector", least=1, most=16384)
    image_size: int = option(224, "pixels a side", least=8, most=2048)
    vision_layers: int | list[int] = 12
    vision_width: int = option(768, "width of the image tower", least=1, most=16384)
    vision_head_width: int = option(64, "width of an attention head", least=1, most=1024)
    patch_size: int | None = option(16, "pixels along a patch of a ViT", least=1, most=512)
    text_width: int = option(768, "width of the text tower", least=1, most=16384)
    text_layers: int = option(12, "layers of the text tower", least=1, most=128)
    text_heads: int = option(12, "attention heads of the text tower", least=1, most=256)
    text_hidden: int = option(3072, "width inside its feed-forward layers", least=1, most=65536)
    vocab_size: int = option(21128, "word pieces", least=5, most=2_000_000)
    max_positions: int = option(512, "places in the table of positions", least=3, most=65536)
    context_length: int = option(52, "tokens of a text, start and end included", least=3, most=65536)
    # FLIP, Li et al. 2022, arXiv:2212.00794
    patch_dropout: float = option(0.0, "share of a ViT's patches left out in training", least=0, below=1)

    def __post_init__(self) -> None:
        check_options(self)
        layers = self.vision_layers
        if not all(1 <= count <= 128 for count in (layers if isinstance(layers, list) else [layers])):
            raise ValueError(f"vision_layers must be from 1 to 128, not {str(layers)[:80]}")
        if isinstance(layers, list):
            if len(layers) != 4:
                raise ValueError(f"a ResNet has four groups of layers, not {len(layers)}")
        elif not self.patch_size or self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        if self.context_length > self.max_positions:
            raise ValueError(f"context_length={self.context_length} is above max_positions={self.max_positions}")


LARGE: dict[str, Any] = {"embed_dim": 768, "vision_layers": 24, "vision_width": 1024, "patch_size": 14}
PUBLISHED = {
    "ViT-B-16": ChineseClipConfig(),
    "ViT-L-14": ChineseClipConfig(**LARGE),
    "ViT-L-14-336": ChineseClipConfig(**LARGE, image_size=336),
    "ViT-H-14": ChineseClipConfig(
        embed_dim=1024, vision_layers=32, vision_width=1280, vision_head_width=80, patch_size=14,
        text_width=1024, text_layers=24, text_heads=16, text_hidden=4096,
    ),
    "RN50": ChineseClipConfig(
        embed_dim=1024, vision_layers=[3, 4, 6, 3], vision_width=64, patch_size=None, text_layers=3
    ),
}  # fmt: skip


def known_model(name: str) -> ChineseClipConfig:
    """The sizes of a published model. Raises `ConfigError` for another name."""
    if name not in PUBLISHED:
        raise ConfigError(f"no published Chinese-CLIP is called {name!r}; known: {', '.join(PUBLISHED)}")
    return PUBLISHED[name]
