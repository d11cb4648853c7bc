"""The VQ-VAE image tokenizer: strided convolutions, a quantizer, transposed convolutions.

van den Oord et al. 2017 (arXiv:1711.00937); the shape with one code per 8x8 pixels is CogView's (Ding et al. 2021,
arXiv:2105.13290, section 2.2).
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from vqvae.quantizer import EMAQuantizer

# Annotations stay objects here (no `from __future__ import annotations`): the hub mixin reads the type of `config`
# from the signature of `VQVAE.__init__` to rebuild it from config.json.


@dataclass
class VQVAEConfig:
    """`channels` has one entry for each halving of the resolution, so the stride is 2 ** len(channels)."""

    channels: list[int] = field(default_factory=lambda: [48, 96, 192])
    residual_blocks: int = 2  # on each side, at the resolution of the codes; CogView has none
    code_dim: int = 16
    codebook_size: int = 1024
    lookup: Literal["cosine", "euclidean"] = "euclidean"
    restart_below: float = 0.3  # uses per batch, see EMAQuantizer
    ema_decay: float = 0.98
    # of the pixels, per channel, in [0, 1]
    mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])

    def __post_init__(self) -> None:
        if not self.channels or self.codebook_size < 2 or self.code_dim < 1:
            raise ValueError("a VQ-VAE needs at least one stage, two codes and a code dimension of 1")

    @classmethod
    def cogview(cls, **overrides: Any) -> "VQVAEConfig":
        """The structure and published sizes of CogView's tokenizer: no residual blocks, so no `expand` either."""
        preset: dict[str, Any] = {
            "channels": [512, 512, 512],
            "residual_blocks": 0,
            "code_dim": 256,
            "codebook_size": 8192,
            "lookup": "euclidean",
            "mean": [0.79093, 0.76271, 0.75340],
            "std": [0.30379, 0.32279, 0.32800],
        }
        return cls(**{**preset, **overrides})

    @property
    def stride(self) -> int:
        """Pixels a code, along each side."""
        return 2 ** len(self.channels)


class ResidualBlock(nn.Module):
    """ReLU, 3x3 convolution, ReLU, 1x1 convolution, added to the input (van den Oord et al. 2017, section 4.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.project = nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.relu(self.conv(F.relu(x))))


class Encoder(nn.Module):
    """Images [B, 3, H, W] to vectors [B, D, H/s, W/s]."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        sizes = [3, *config.channels]
        self.down = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2, padding=1) for before, after in zip(sizes, sizes[1:], strict=False)
        )
        self.blocks = nn.Sequential(*(ResidualBlock(sizes[-1]) for _ in range(config.residual_blocks)))
        self.project = nn.Conv2d(sizes[-1], config.code_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.down:
            x = F.relu(conv(x))
        return self.project(F.relu(self.blocks(x)))


class Decoder(nn.Module):
    """Vectors [B, D, h, w] to images [B, 3, h*s, w*s]: the encoder mirrored."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        sizes = [config.code_dim, *reversed(config.channels)]
        self.expand: nn.Module = nn.Identity()
        if config.residual_blocks:
            self.expand = nn.Conv2d(config.code_dim, sizes[1], 3, padding=1)
            sizes[0] = sizes[1]
        self.blocks = nn.Sequential(*(ResidualBlock(sizes[0]) for _ in range(config.residual_blocks)))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)
            for before, after in zip(sizes, sizes[1:], strict=False)
        )
        self.project = nn.Conv2d(sizes[-1], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.expand(x))
        for conv in self.up:
            x = F.relu(conv(x))
        return self.project(x)


@dataclass
class Reconstruction:
    """`images` [B, 3, H, W] in [0, 1] (not clamped), `codes` [B, H/s, W/s], and two scalar losses."""

    images: Tensor
    codes: Tensor
    pixel_loss: Tensor
    commitment: Tensor


class VQVAE(nn.Module, PyTorchModelHubMixin, library_name="mmwudao", license="apache-2.0"):
    """Images to discrete codes and back."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = EMAQuantizer(
            config.codebook_size,
            config.code_dim,
            cosine=config.lookup == "cosine",
            decay=config.ema_decay,
            restart_below=config.restart_below,
        )
        self.decoder = Decoder(config)
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)

    mean: Tensor
    std: Tensor

    def forward(self, images: Tensor) -> Reconstruction:
        """Encode, quantise and decode `images` [B, 3, H, W] in [0, 1]; the losses are those of training."""
        vectors = self.encoder(self._normalise(images)).permute(0, 2, 3, 1)  # [B, h, w, D]
        quantized = self.quantizer(vectors)
        decoded = self.decoder(quantized.vectors.permute(0, 3, 1, 2)).float()
        restored = decoded * self.std + self.mean
        return Reconstruction(restored, quantized.codes, F.mse_loss(restored, images.float()), quantized.commitment)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes [B, H/s, W/s] int64 of `images` [B, 3, H, W] in [0, 1]; `ValueError` if s does not divide H and W."""
        vectors = self.encoder(self._normalise(images)).permute(0, 2, 3, 1)
        flat = vectors.reshape(-1, vectors.shape[-1]).float()
        if self.config.lookup == "cosine":
            flat = F.normalize(flat, dim=-1)
        return self.quantizer.nearest(flat).view(vectors.shape[:-1])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images [B, 3, h*s, w*s] in [0, 1], float32, of `codes` [B, h, w]."""
        if codes.min() < 0 or codes.max() >= self.config.codebook_size:
            raise ValueError(f"codes must lie in 0..{self.config.codebook_size - 1}")
        weight = self.decoder.project.weight
        vectors = self.quantizer.lookup(codes).permute(0, 3, 1, 2).to(weight.dtype)
        vectors = vectors.contiguous(memory_format=torch.channels_last)
        restored = self.decoder(vectors).float() * self.std.float() + self.mean.float()
        return restored.clamp(0, 1)

    def _normalise(self, images: Tensor) -> Tensor:
        stride = self.config.stride
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W], not {list(images.shape)}")
        if images.shape[2] % stride or images.shape[3] % stride:
            raise ValueError(f"height and width must be multiples of {stride}, not {images.shape[2]}x{images.shape[3]}")
        normalised = ((images - self.mean) / self.std).to(self.encoder.project.weight.dtype)
        return normalised.contiguous(memory_format=torch.channels_last)
