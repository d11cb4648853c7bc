"""Super-resolution: pictures of twice the size, as a bicubic enlargement plus what a small network adds to it.

EDSR (Lim et al. 2017, arXiv:1707.02921, section 3): residual blocks without batch norm, and one pixel shuffle (Shi et
al. 2016, arXiv:1609.05158) at the end. The bicubic skip is not EDSR's: with it, an untrained network is bicubic.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from data.options import DEPTH, WIDTH, check_options, option

# Annotations stay objects here, as in `vqvae.model`: the hub mixin reads the type of `config`.

SCALE = 2


@dataclass
class UpscalerConfig:
    """`channels` of every layer, and the number of residual `blocks`."""

    channels: int = option(32, "Channels of every layer.", least=1, most=WIDTH)
    blocks: int = option(4, "Residual blocks.", least=1, most=DEPTH)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def reach(self) -> int:
        """How many pixels away a pixel of the input can count: one a 3x3 convolution, and two of the bicubic skip."""
        return max(2, 2 * self.blocks + 3)


class UpscalerBlock(nn.Module):
    """3x3 convolution, ReLU, 3x3 convolution, added to the input (Lim et al. 2017, figure 2c)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class Upscaler(nn.Module, PyTorchModelHubMixin, library_name="mmwudao", license="apache-2.0"):
    """Pictures to pictures of twice the width and height."""

    def __init__(self, config: UpscalerConfig) -> None:
        super().__init__()
        self.config = config
        self.read = nn.Conv2d(3, config.channels, 3, padding=1)
        self.blocks = nn.Sequential(*(UpscalerBlock(config.channels) for _ in range(config.blocks)))
        self.gather = nn.Conv2d(config.channels, config.channels, 3, padding=1)
        self.write = nn.Conv2d(config.channels, 3 * SCALE**2, 3, padding=1)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """`images` [B, 3, H, W] in [0, 1] to [B, 3, 2H, 2W], not clamped. Raises `ValueError` for another shape."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W], not {list(images.shape)}")
        features = self.read((images - 0.5).contiguous(memory_format=torch.channels_last))
        features = features + self.gather(self.blocks(features))
        detail = F.pixel_shuffle(self.write(features), SCALE)
        return F.interpolate(images, scale_factor=SCALE, mode="bicubic", align_corners=False) + detail

    @torch.no_grad()
    def enlarge(self, images: Tensor, rows: int = 256) -> Tensor:
        """`images` [B, 3, H, W] in [0, 1] to [B, 3, 2H, 2W] in [0, 1], in strips of `rows` to save memory.

        A strip is read with as many rows around it as can count for it, so that the strips leave no seams.
        """
        reach, height = self.config.reach, images.shape[-2]
        strips = []
        for start in range(0, height, rows):
            above, end = max(0, start - reach), min(height, start + rows)
            strip = self(images[:, :, above : min(height, end + reach)])
            strips.append(strip[:, :, SCALE * (start - above) : SCALE * (end - above)])
        return torch.cat(strips, dim=2).clamp(0, 1)
