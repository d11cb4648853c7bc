"""The image tokenizer of LlamaGen and Janus: residual blocks, attention where it is coarsest, codes on the unit sphere.

Sun et al. 2024 (arXiv:2406.06525, section 3.1), which follows VQGAN (Esser et al. 2021, arXiv:2012.09841). It has the
interface of `vqvae.model.VQVAE` as far as drawing and tokenizing need it, and is not trained here.
Shapes: B pictures, C channels, D code width, h x w codes of H x W pixels, s the stride.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from data.options import DEPTH, WIDTH, check_options, option

# Annotations stay objects here, see `vqvae.model`.

GROUPS = 32  # of every norm


@dataclass
class VQ16Config:
    """The sizes published as VQ-16. `multipliers` times `channels` are the widths of the levels, finest first."""

    architecture: Literal["vq16"] = "vq16"  # in config.json: which tokenizer this is
    channels: int = option(128, "The width at the resolution of the pixels.", least=1, most=WIDTH)
    multipliers: list[int] = option([1, 1, 2, 2, 4], "Times `channels`: the widths of the levels.", least=1, most=64)
    residual_blocks: int = option(
        2, "Residual blocks of a level of the encoder; the decoder has one more.", least=1, most=DEPTH
    )
    latent: int = option(256, "The width between the coarsest level and the codes.", least=1, most=WIDTH)
    code_dim: int = option(8, "The dimension of a code.", least=1, most=WIDTH)
    codebook_size: int = option(16384, "How many codes there are.", least=2, most=2**20)

    def __post_init__(self) -> None:
        check_options(self)
        if not 1 <= len(self.multipliers) <= 8:
            raise ValueError("multipliers must hold 1 to 8 numbers")
        if self.channels % GROUPS:
            raise ValueError(f"channels must be a multiple of {GROUPS}, not {self.channels}")

    @property
    def stride(self) -> int:
        """Pixels a code, along each side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of the levels, finest first."""
        return [self.channels * multiplier for multiplier in self.multipliers]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class ConvBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, added to the input (through a 1x1 convolution if the width changes)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = _norm(after), nn.Conv2d(after, after, 3, padding=1)
        self.shortcut: nn.Module = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        # in place, and no name for what is between: such a tensor of a picture has 75 MB
        inner = F.silu(self.norm2(self.conv1(F.silu(self.norm1(x), inplace=True))), inplace=True)
        return self.conv2(inner).add_(self.shortcut(x))


class PlaceAttention(nn.Module):
    """Attention with one head of every place [C] to all others of the picture, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.project = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # [B, h * w, C]
        mixed = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        return x + self.project(mixed.transpose(1, 2).reshape(x.shape))


class Level(nn.Module):
    """The blocks of one resolution, each with attention behind it at the coarsest; then what changes the resolution."""

    def __init__(self, before: int, after: int, blocks: int, attends: bool, resize: nn.Module | None) -> None:
        super().__init__()
        widths = [before, *[after] * blocks]
        self.blocks = nn.ModuleList(ConvBlock(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.attention = nn.ModuleList(PlaceAttention(after) for _ in range(blocks if attends else 0))
        self.resize: nn.Module = resize or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for place, block in enumerate(self.blocks):
            x = block(x)
            if len(self.attention):
                x = self.attention[place](x)
        return self.resize(x)


class Halve(nn.Module):
    """A 3x3 convolution of stride 2, after a row and a column of zeros at the bottom and on the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """Every pixel four times, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Side(nn.Module):
    """What encoder and decoder share: a first convolution, levels, a middle, and norm, SiLU and convolution last."""

    def __init__(self, ends: tuple[int, int], inner: tuple[int, int], levels: list[Level], middle: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(ends[0], inner[0], 3, padding=1)
        self.levels = nn.ModuleList(levels)
        self.middle = nn.Sequential(ConvBlock(middle, middle), PlaceAttention(middle), ConvBlock(middle, middle))
        self.norm, self.last = _norm(inner[1]), nn.Conv2d(inner[1], ends[1], 3, padding=1)

    def _ended(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.norm(x), inplace=True))


class PictureEncoder(_Side):
    """Pictures [B, 3, H, W] to vectors [B, latent, h, w]."""

    def __init__(self, config: VQ16Config) -> None:
        widths, blocks = config.widths, config.residual_blocks
        pairs = [*zip([widths[0], *widths], widths, strict=False)]  # channels of a level's input and of itself
        levels = [Level(*pair, blocks, False, Halve(pair[1])) for pair in pairs[:-1]]
        levels.append(Level(*pairs[-1], blocks, True, None))
        super().__init__((3, config.latent), (widths[0], widths[-1]), levels, widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for level in self.levels:
            x = level(x)
        return self._ended(self.middle(x))


class PictureDecoder(_Side):
    """Vectors [B, latent, h, w] to pictures [B, 3, H, W]; the levels are coarsest first."""

    def __init__(self, config: VQ16Config) -> None:
        widths, blocks = config.widths[::-1], config.residual_blocks + 1
        pairs = [*zip([widths[0], *widths], widths, strict=False)]
        levels = [Level(*pair, blocks, place == 0, Double(pair[1])) for place, pair in enumerate(pairs[:-1])]
        levels.append(Level(*pairs[-1], blocks, len(pairs) == 1, None))
        super().__init__((config.latent, 3), (widths[0], widths[-1]), levels, widths[0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x))
        for level in self.levels:
            x = level(x)
        return self._ended(x)


class VQ16(nn.Module, PyTorchModelHubMixin, library_name="mmwudao", license="apache-2.0"):
    """Images to discrete codes and back."""

    def __init__(self, config: VQ16Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = PictureEncoder(config)
        self.to_code = nn.Conv2d(config.latent, config.code_dim, 1)
        self.codebook = nn.Embedding(config.codebook_size, config.code_dim)
        self.from_code = nn.Conv2d(config.code_dim, config.latent, 1)
        self.decoder = PictureDecoder(config)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes [B, H/s, W/s] int64 of `images` [B, 3, H, W] in [0, 1]; `ValueError` if s does not divide H and W.

        A vector's code is the one with the largest cosine, as in the published code.
        """
        stride, weight = self.config.stride, self.codebook.weight
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % stride or images.shape[3] % stride:
            raise ValueError(f"images must be [B, 3, H, W], H and W multiples of {stride}, not {list(images.shape)}")
        vectors = self.to_code(self.encoder((2 * images - 1).to(weight.dtype))).permute(0, 2, 3, 1)
        cosines = F.normalize(vectors.float(), dim=-1) @ F.normalize(weight.float(), dim=-1).T
        return cosines.argmax(dim=-1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images [B, 3, h*s, w*s] in [0, 1], float32, of `codes` [B, h, w]."""
        if codes.min() < 0 or codes.max() >= self.config.codebook_size:
            raise ValueError(f"codes must lie in 0..{self.config.codebook_size - 1}")
        vectors = F.normalize(self.codebook(codes), dim=-1).permute(0, 3, 1, 2)
        vectors = vectors.contiguous(memory_format=torch.channels_last)
        return ((self.decoder(self.from_code(vectors)).float() + 1) / 2).clamp(0, 1)
