"""The VQ-VAE image tokenizer: strided convolutions, a quantizer, transposed convolutions.

van den Oord et al. 2017 (arXiv:1711.00937); the shape with one code per 8x8 pixels is CogView's (Ding et al. 2021,
arXiv:2105.13290, section 2.2).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from data.options import COUNT, DEPTH, WIDTH, check_options, option
from vqvae.quantizer import EMAQuantizer

# Annotations stay objects here (no `from __future__ import annotations`): the hub mixin reads the type of `config`
# from the signature of `VQVAE.__init__` to rebuild it from config.json.


@dataclass
class VQVAEConfig:
    """`channels` has one entry for each halving of the resolution, so the stride is 2 ** len(channels)."""

    channels: list[int] = option([48, 96, 192], "The widths of the stages, each of half the size.", least=1, most=WIDTH)
    residual_blocks: int = option(
        2, "Residual blocks on each side, at the resolution of the codes; CogView has none.", least=0, most=DEPTH
    )
    # the decoder alone runs when drawing, so it may be larger than the encoder; by default it mirrors it
    decoder_channels: list[int] = option(
        [], "The widths of the decoder's stages in the order of `channels`; empty: the same.", least=1, most=WIDTH
    )
    decoder_blocks: int | None = option(
        None, "Residual blocks of the decoder at the resolution of the codes; by default as many as on the other side.",
        least=0, most=DEPTH,
    )  # fmt: skip
    stage_blocks: int = option(
        0, "Residual blocks of the decoder after each doubling but the last.", least=0, most=DEPTH
    )
    # nearest: repeat pixels, then a 3x3 convolution, which leaves no chequerboard (Odena et al. 2016)
    upsampling: Literal["transposed", "nearest"] = "transposed"
    code_dim: int = option(16, "The dimension of a code.", least=1, most=WIDTH)
    codebook_size: int = option(1024, "How many codes there are.", least=2, most=2**20)
    lookup: Literal["cosine", "euclidean"] = "euclidean"
    restart_below: float = option(
        0.3, "Codes with fewer uses per batch start anew (see `EMAQuantizer`).", least=0, most=COUNT
    )
    ema_decay: float = option(0.98, "Decay per step of the codes' moving averages.", least=0, below=1)
    mean: list[float] = option([0.5, 0.5, 0.5], "The mean of the pixels, per channel.", least=0, most=1)
    std: list[float] = option([0.5, 0.5, 0.5], "The standard deviation of the pixels, per channel.", above=0, most=1)

    def __post_init__(self) -> None:
        check_options(self)
        if not 1 <= len(self.channels) <= 8 or len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError("channels must hold 1 to 8 widths, mean and std three numbers each")
        if self.decoder_channels and len(self.decoder_channels) != len(self.channels):
            raise ValueError("decoder_channels must have as many stages as channels, or be empty")

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
    """Vectors [B, D, h, w] to images [B, 3, h*s, w*s]: the encoder mirrored, or a larger one."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        sizes = [config.code_dim, *reversed(config.decoder_channels or config.channels)]
        blocks = config.residual_blocks if config.decoder_blocks is None else config.decoder_blocks
        self.expand: nn.Module = nn.Identity()
        if blocks:
            self.expand = nn.Conv2d(config.code_dim, sizes[1], 3, padding=1)
            sizes[0] = sizes[1]
        self.blocks = nn.Sequential(*(ResidualBlock(sizes[0]) for _ in range(blocks)))
        double = _doubling if config.upsampling == "nearest" else _transposed
        self.up = nn.ModuleList(double(before, after) for before, after in zip(sizes, sizes[1:], strict=False))
        # the last stage has most pixels: blocks there would cost more than all others
        counts = [config.stage_blocks] * (len(self.up) - 1) + [0]
        self.refine = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(after) for _ in range(count)))
            for after, count in zip(sizes[1:], counts, strict=True)
        )
        self.project = nn.Conv2d(sizes[-1], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.expand(x))
        for conv, refine in zip(self.up, self.refine, strict=True):
            x = refine(F.relu(conv(x)))
        return self.project(x)


def _transposed(before: int, after: int) -> nn.Module:
    return nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)


def _doubling(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(before, after, 3, padding=1))


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
