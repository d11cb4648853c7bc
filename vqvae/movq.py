"""The picture tokenizer of Emu3: MoVQ with convolutions over time, of which one picture needs the first frame alone.

Wang et al. 2024 (arXiv:2409.18869, section 2.2), after MoVQ (Zheng et al. 2022, arXiv:2209.09002), whose decoder scales
and shifts every norm by the codes of the place. The convolutions over time look back only, so the first frame of a
picture's four depends on no other, and only it is decoded. The modules are named as in transformers' `Emu3VQVAE`, and
it has the interface of `vqvae.model.VQVAE` as far as drawing and tokenizing need it.
Shapes: B pictures, C channels, D code width, F frames, h x w codes of H x W pixels, s the stride.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from data.options import DEPTH, WIDTH, check_options, option
from vqvae.vq16 import GROUPS, Double, Halve

# Annotations stay objects here, see `vqvae.model`.

AT_ONCE = 1024  # vectors whose codes are looked for together


@dataclass
class MoVQConfig:
    """The sizes of a published tokenizer. `multipliers` times `channels` are the widths of the levels, finest first."""

    architecture: Literal["movq"] = "movq"  # in config.json: which tokenizer this is
    channels: int = option(256, "The width at the resolution of the pixels.", least=1, most=WIDTH)
    multipliers: list[int] = option([1, 2, 2, 4], "Times `channels`: the widths of the levels.", least=1, most=64)
    residual_blocks: int = option(
        2, "Residual blocks of a level of the encoder; the decoder has one more.", least=1, most=DEPTH
    )
    attention_levels: list[int] = option([3], "The levels with attention behind each block.", least=0, most=7)
    code_dim: int = option(
        4, "The dimension of a code, and of what stands between it and the levels.", least=1, most=WIDTH
    )
    codebook_size: int = option(32768, "How many codes there are.", least=2, most=2**20)
    time_levels: int = option(2, "How often the number of frames is halved.", least=0, most=4)

    def __post_init__(self) -> None:
        check_options(self)
        if not 1 <= len(self.multipliers) <= 8:
            raise ValueError("multipliers must hold 1 to 8 numbers")
        if self.channels % GROUPS:
            raise ValueError(f"channels must be a multiple of {GROUPS}, not {self.channels}")
        for level in self.attention_levels:
            if level >= len(self.multipliers) or self.multipliers[level] != self.multipliers[-1]:
                raise ValueError(f"attention_levels must name levels as wide as the coarsest, not {level}")

    @property
    def stride(self) -> int:
        """Pixels a code, along each side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of the levels, finest first."""
        return [self.channels * multiplier for multiplier in self.multipliers]


class TimeConv(nn.Module):
    """A convolution over frames and places that looks back in time: [B, C, F, h, w] to [B, C', F / stride, h, w]."""

    def __init__(self, before: int, after: int, kernel: tuple[int, int, int], stride: int = 1) -> None:
        super().__init__()
        side = (kernel[1] - 1) // 2
        self.padding = (side, side, side, side, 2, 0)
        self.conv = nn.Conv3d(before, after, kernel, stride=(stride, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class TimeResize(nn.Module):
    """A convolution that halves the frames, or follows their doubling; then SiLU."""

    def __init__(self, channels: int, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        self.conv = TimeConv(channels, channels, (4 if halves else 3, 3, 3), 2 if halves else 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv(x if self.halves else x.repeat_interleave(2, dim=2)))


class FrozenNorm(nn.Module):
    """Batch normalisation by the stored mean and variance of each channel."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class TimeBlock(nn.Module):
    """Norm, SiLU, convolution over time, twice, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = FrozenNorm(channels), TimeConv(channels, channels, (3, 3, 3))
        self.norm2, self.conv2 = FrozenNorm(channels), TimeConv(channels, channels, (3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(inner)))


class PlainNorm(nn.GroupNorm):
    """A norm that takes no notice of the codes."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels, eps=1e-6)

    def forward(self, x: Tensor, codes: Tensor | None = None) -> Tensor:
        return super().forward(x)


class CodeNorm(nn.Module):
    """A norm that is scaled and shifted at each place by what two 1x1 convolutions make of its code's vector."""

    def __init__(self, channels: int, code_dim: int) -> None:
        super().__init__()
        self.norm_layer = PlainNorm(channels)
        self.conv_y, self.conv_b = nn.Conv2d(code_dim, channels, 1), nn.Conv2d(code_dim, channels, 1)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        height, width = codes.shape[-2:]
        normed = self.norm_layer(x)
        # all places of a code have its scale: of the codes, and not of the pixels, which are up to 64 times as many
        cells = normed.view(*x.shape[:2], height, x.shape[2] // height, width, x.shape[3] // width)
        scale, shift = (layer(codes)[:, :, :, None, :, None] for layer in (self.conv_y, self.conv_b))
        return cells.mul_(scale).add_(shift).view(x.shape)


def _make_norm(channels: int, code_dim: int) -> nn.Module:
    return CodeNorm(channels, code_dim) if code_dim else PlainNorm(channels)


class CodedBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, added to the input (through a 1x1 convolution if the width changes)."""

    def __init__(self, before: int, after: int, code_dim: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _make_norm(before, code_dim), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = _make_norm(after, code_dim), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, codes: Tensor | None) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x, codes), inplace=True))
        inner = self.conv2(F.silu(self.norm2(inner, codes), inplace=True))
        return inner.add_(self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class CodedAttention(nn.Module):
    """Attention with one head of every place to all others of the picture: [B, C, h, w], normed, to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        places = x.flatten(2).transpose(1, 2)[:, None]  # [B, 1, h * w, C]
        q, k, v = (layer(places) for layer in (self.q_proj, self.k_proj, self.v_proj))
        mixed = self.out_proj(F.scaled_dot_product_attention(q, k, v))
        return mixed[:, 0].transpose(1, 2).reshape(x.shape)


class CodedLevel(nn.Module):
    """The blocks of one resolution, perhaps each with attention behind it; then what changes the resolution."""

    def __init__(
        self, before: int, after: int, blocks: int, code_dim: int, *, attends: bool, resize: nn.Module | None
    ) -> None:
        super().__init__()
        widths = [before, *[after] * blocks]
        self.block = nn.ModuleList(CodedBlock(*pair, code_dim) for pair in zip(widths, widths[1:], strict=False))
        self.attn = nn.ModuleList(CodedAttention(after) for _ in range(blocks if attends else 0))
        self.attn_norms = nn.ModuleList(_make_norm(after, code_dim) for _ in self.attn)
        if resize is not None:
            self.add_module("upsample" if code_dim else "downsample", resize)

    def forward(self, x: Tensor, codes: Tensor | None = None) -> Tensor:
        for place, block in enumerate(self.block):
            x = block(x, codes)
            if len(self.attn):
                x = x + self.attn[place](self.attn_norms[place](x, codes))
        resize = getattr(self, "downsample" if codes is None else "upsample", None)
        return x if resize is None else resize(x)


class CodedMiddle(nn.Module):
    """A block, attention, a block."""

    def __init__(self, channels: int, code_dim: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = (CodedBlock(channels, channels, code_dim) for _ in range(2))
        self.attn_1, self.attn_norm = CodedAttention(channels), _make_norm(channels, code_dim)

    def forward(self, x: Tensor, codes: Tensor | None = None) -> Tensor:
        x = self.block_1(x, codes)
        return self.block_2(x + self.attn_1(self.attn_norm(x, codes)), codes)


class FrameEncoder(nn.Module):
    """Pictures [B, 3, H, W] to [B, D, 1, h, w]: a picture stands for all frames that become one."""

    def __init__(self, config: MoVQConfig) -> None:
        super().__init__()
        widths, latent = config.widths, config.code_dim
        self.frames = 2**config.time_levels
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        pairs = [*zip([config.channels, *widths], widths, strict=False)]
        levels = [
            CodedLevel(
                *pair, config.residual_blocks, 0, attends=level in config.attention_levels,
                resize=Halve(pair[1]) if level < len(pairs) - 1 else None,
            )
            for level, pair in enumerate(pairs)
        ]  # fmt: skip
        self.down_block = nn.ModuleDict({"down": nn.ModuleList(levels)})
        self.middle_block = CodedMiddle(widths[-1], 0)
        self.norm_out, self.conv_out = PlainNorm(widths[-1]), nn.Conv2d(widths[-1], latent, 3, padding=1)
        self.time_conv = nn.ModuleList(TimeResize(latent, True) for _ in range(config.time_levels))
        self.time_res_stack = nn.ModuleList(TimeBlock(latent) for _ in range(config.residual_blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_block["down"].children():
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(self.middle_block(x)), inplace=True))
        x = x[:, :, None].repeat(1, 1, self.frames, 1, 1)
        for layer in (*self.time_conv, *self.time_res_stack):
            x = layer(x)
        return x


class FrameDecoder(nn.Module):
    """What the codes became, and their vectors, each [B, D, 1, h, w], to pictures [B, 3, H, W], the first frame."""

    def __init__(self, config: MoVQConfig) -> None:
        super().__init__()
        widths, latent = config.widths[::-1], config.code_dim  # coarsest first
        self.time_res_stack = nn.ModuleList(TimeBlock(latent) for _ in range(config.residual_blocks))
        self.time_conv = nn.ModuleList(TimeResize(latent, False) for _ in range(config.time_levels))
        self.conv_in = nn.Conv2d(latent, widths[0], 3, padding=1)
        self.middle_block = CodedMiddle(widths[0], latent)
        pairs = [*zip([widths[0], *widths], widths, strict=False)]
        levels = [
            CodedLevel(
                *pair, config.residual_blocks + 1, latent, attends=len(pairs) - 1 - place in config.attention_levels,
                resize=Double(pair[1]) if place < len(pairs) - 1 else None,
            )
            for place, pair in enumerate(pairs)
        ]  # fmt: skip
        self.up_block = nn.ModuleDict({"up": nn.ModuleList(levels[::-1])})
        self.norm_out, self.conv_out = CodeNorm(widths[-1], latent), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        both = torch.cat([x, vectors])
        for layer in (*self.time_res_stack, *self.time_conv):
            both = layer(both)
        x, codes = both[:, :, 0].contiguous().chunk(2)
        x = self.middle_block(self.conv_in(x), codes)
        for level in reversed([*self.up_block["up"].children()]):
            x = level(x, codes)
        return self.conv_out(F.silu(self.norm_out(x, codes), inplace=True))


class MoVQ(nn.Module, PyTorchModelHubMixin, library_name="mmwudao", license="apache-2.0"):
    """Images to discrete codes and back."""

    def __init__(self, config: MoVQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = FrameEncoder(config), FrameDecoder(config)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.codebook_size, config.code_dim)})
        self.quant_conv = TimeConv(config.code_dim, config.code_dim, (3, 1, 1))
        self.post_quant_conv = TimeConv(config.code_dim, config.code_dim, (3, 1, 1))

    @property
    def codebook(self) -> Tensor:
        """[N, D]"""
        weight = self.quantize["embedding"].weight
        assert isinstance(weight, Tensor)
        return weight

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes [B, H/s, W/s] int64 of `images` [B, 3, H, W] in [0, 1]; `ValueError` if s does not divide H and W."""
        stride, codebook = self.config.stride, self.codebook
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % stride or images.shape[3] % stride:
            raise ValueError(f"images must be [B, 3, H, W], H and W multiples of {stride}, not {list(images.shape)}")
        vectors = self.quant_conv(self.encoder((2 * images - 1).to(codebook.dtype)))[:, :, 0].permute(0, 2, 3, 1)
        codebook, squares = codebook.float(), codebook.float().square().sum(dim=1)
        parts = vectors.flatten(0, 2).float().split(AT_ONCE)
        codes = torch.cat([(squares - 2 * part @ codebook.T).argmin(dim=1) for part in parts])
        return codes.view(vectors.shape[:3])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images [B, 3, h*s, w*s] in [0, 1], float32, of `codes` [B, h, w]."""
        if codes.min() < 0 or codes.max() >= self.config.codebook_size:
            raise ValueError(f"codes must lie in 0..{self.config.codebook_size - 1}")
        vectors = F.embedding(codes, self.codebook).permute(0, 3, 1, 2)[:, :, None].contiguous()
        return ((self.decoder(self.post_quant_conv(vectors), vectors).float() + 1) / 2).clamp(0, 1)
