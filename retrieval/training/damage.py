"""Tokenizers, blur, noise and JPEG for training pictures: what may have happened to a picture that is judged."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from retrieval.training.pairs import AugmentConfig
from vqvae.model import VQVAE
from vqvae.storage.parts import load_part

SIGMA = (0.002, 0.012)  # of a blur, as shares of the side
NOISE = (0.01, 0.06)  # standard deviations, where white is 1
QUALITY = (20, 90)  # of JPEG


class PictureDamage:
    """Damages pictures, each with the probabilities of the configuration; where all are 0, it draws nothing."""

    def __init__(self, config: AugmentConfig, device: torch.device) -> None:
        """Load the tokenizers of `config.reconstructions`. Raises `ModelError`."""
        self.config = config
        folders = config.reconstructions if config.reconstructed else []
        self.tokenizers = [load_part(VQVAE, folder).float().to(device).requires_grad_(False) for folder in folders]

    @torch.no_grad()
    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Pictures [N, 3, S, S] in [0, 1] -> the same shape and range; what was given stays as it is."""
        config = self.config
        steps = (
            (config.reconstructed, self._reconstruct),
            (config.blur, self._blur),
            (config.noise, self._noise),
            (config.jpeg, self._compress),
        )
        for probability, damage in steps:
            if not probability:
                continue
            chosen = torch.rand(len(pixels), generator=generator) < probability
            rows = chosen.nonzero()[:, 0].to(pixels.device)
            if len(rows):
                damaged = damage(pixels[rows], generator).to(pixels).clamp(0, 1)
                pixels = pixels.index_copy(0, rows, damaged)
        return pixels

    def _reconstruct(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        which = torch.randint(len(self.tokenizers), (len(pixels),), generator=generator)
        result, side = pixels.clone(), pixels.shape[-1]
        for number, tokenizer in enumerate(self.tokenizers):
            rows = (which == number).nonzero()[:, 0].to(pixels.device)
            if not len(rows):
                continue
            stride = tokenizer.config.stride
            fitting = max(1, round(side / stride)) * stride
            seen = _resized(pixels[rows], fitting)
            result[rows] = _resized(tokenizer.decode(tokenizer.encode(seen)), side).to(result)
        return result

    def _blur(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        side = pixels.shape[-1]
        sigmas = (_uniform(SIGMA, len(pixels), generator) * side).tolist()
        with torch.autocast(pixels.device.type, enabled=False):  # bfloat16 has too few bits for pixels
            return torch.stack(
                [
                    transforms.gaussian_blur(picture, [2 * int(3 * sigma) + 3] * 2, [sigma, sigma])
                    for picture, sigma in zip(pixels, sigmas, strict=True)
                ]
            )

    def _noise(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        # torchvision's own takes no generator, and the seed of a batch decides all of it
        deviation = _uniform(NOISE, len(pixels), generator)[:, None, None, None]
        return pixels + (deviation * torch.randn(pixels.shape, generator=generator)).to(pixels)

    def _compress(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        qualities = _uniform(QUALITY, len(pixels), generator).round().int().tolist()
        whole = (pixels * 255).round().to("cpu", torch.uint8)
        return torch.stack([transforms.jpeg(p, quality) for p, quality in zip(whole, qualities, strict=True)]) / 255


def _uniform(limits: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    """Float32 [count], each between the limits."""
    low, high = limits
    return low + (high - low) * torch.rand(count, generator=generator)


def _resized(pixels: Tensor, side: int) -> Tensor:
    if pixels.shape[-1] == side:
        return pixels
    return F.interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
