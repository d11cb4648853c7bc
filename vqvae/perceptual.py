"""How different two pictures look to a network trained on ImageNet: the perceptual term of a tokenizer's loss.

Zhang et al. 2018 (arXiv:1801.03924), eq. 1, with EfficientNet in the place of AlexNet and all weights w_l equal: nobody
has asked people which of two pictures is closer for this network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.options import SIDE, check_options, option
from vqvae.trunk import Trunk, load_trunk


@dataclass
class PerceptualConfig:
    """The perceptual term of the loss. Raises `ValueError` for a weight without a trunk, or without stages."""

    trunk: str = option("", "The folder of a trunk (`mmwudao import trunk`).")
    weight: float = option(0.0, "Weight of the distance in the loss; 0 switches it off.", least=0, most=1e6)
    stages: list[int] = option(
        [0, 1, 2, 3], "The resolution stages of the trunk that are compared, from 0.", least=0, most=100
    )
    size: int = option(0, "Pictures of a smaller side are enlarged to this many pixels; 0 never.", least=0, most=SIDE)

    def __post_init__(self) -> None:
        check_options(self)
        if self.weight and not (self.trunk and self.stages):
            raise ValueError("perceptual.weight needs perceptual.trunk and at least one of perceptual.stages")


class PerceptualDistance(nn.Module):
    """The distance between pictures by a frozen trunk. Raises `ValueError` for a stage that the trunk lacks."""

    def __init__(self, trunk: Trunk, stages: list[int], size: int = 0) -> None:
        super().__init__()
        last = len(trunk.stage_channels) - 1
        if not all(0 <= stage <= last for stage in stages):
            raise ValueError(f"perceptual.stages must lie in 0..{last} for this trunk, not {stages}")
        # channels last is what the depthwise convolutions run fastest in
        self.trunk = trunk.float().eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.stages, self.size = sorted(set(stages)), size

    @classmethod
    def from_config(cls, config: PerceptualConfig) -> PerceptualDistance:
        """With the trunk of `config`. Raises `ModelError` for a trunk that cannot be read."""
        return cls(load_trunk(config.trunk), config.stages, config.size)

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        """The mean distance (scalar) of `images` [B, 3, H, W] in [0, 1] to `originals`, which get no gradient.

        At each place of a stage's map the features are scaled to unit length; squared differences are summed over
        channels, averaged over places, then over stages.
        """
        with torch.no_grad():
            expected = self._features(originals)
        distances = [
            (found - wanted).square().sum(dim=1).mean()
            for found, wanted in zip(self._features(images), expected, strict=True)
        ]
        return torch.stack(distances).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        side = min(images.shape[-2:])
        if side < self.size:
            images = F.interpolate(images, scale_factor=self.size / side, mode="bilinear")
        x = self.trunk.normalise(images).contiguous(memory_format=torch.channels_last)
        maps = self.trunk.forward_stages(x, last=self.stages[-1])
        return [F.normalize(maps[stage].float(), dim=1, eps=1e-6) for stage in self.stages]
