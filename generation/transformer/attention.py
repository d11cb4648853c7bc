"""Dense attention and rotary positions.

Shapes: B rows, H heads, K heads of keys and values, T tokens, S tokens that are looked at, d head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.transformer.config import TransformerConfig

Rotation = tuple[Tensor, Tensor]  # cos and sin [B, 1, T, d/2], see `rotate`


class DenseAttention(nn.Module):
    """Attention of each query to all keys that a bias leaves, by PyTorch's kernels or with PB-relax. No parameters.

    A module, so that it knows whether it trains (dropout), and torch.compile takes its settings for constants.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def plain(self) -> bool:
        """Neither dropout nor PB-relax, which not all kernels know."""
        return not (self.config.pb_relax or (self.training and self.config.dropout))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """[B, H, T, d] of `q` [B, H, T, d] and `k`, `v` [B, K, S, d]; `bias` is added to the scores, None is causal."""
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        dropout = self.config.dropout if self.training else 0.0
        if self.config.pb_relax:
            return relaxed_attention(q, k, v, bias, self.config.pb_relax, dropout)
        bias = None if bias is None else bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, bias, dropout, is_causal=bias is None)


def relaxed_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, alpha: float, dropout: float) -> Tensor:
    """Attention with precision-bottleneck relaxation (CogView section 2.4, equations 3 and 4).

    softmax((Q^T K / (alpha sqrt(d)) - max) * alpha): the same numbers as plain attention, but the product stays
    alpha times smaller, inside the range of float16. `bias` is added to the scores; None is causal.
    """
    scores = (q / (alpha * math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)  # [B, H, T, S]
    if bias is None:
        length = scores.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    else:
        scores = scores + (bias / alpha).to(scores.dtype)
    scores = (scores - scores.amax(-1, keepdim=True).detach()) * alpha
    return F.dropout(scores.softmax(-1), dropout) @ v


def single_query_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention of one query a row, q [B, H, 1, d], in the dtype of the keys and values [B, K, S, d]."""
    grouped = q.view(len(q), k.shape[1], -1, q.shape[-1])  # those that share a head of keys are its queries
    scores = (grouped.to(k.dtype) / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1) + bias.to(k.dtype)
    return (scores.softmax(-1) @ v).to(q.dtype).view(q.shape)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values [B, K, S, d] as [B, H, S, d], each of them as often as queries share it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (i, i + d/2) of `x` [B, H, T, d] by the angles whose cos and sin [B, 1, T, d/2] are given.

    Rotary positions (Su et al. 2021, arXiv:2104.09864, section 3.2.2); the first half of the pairs turns with the
    position along axis 0 and the second half with axis 1.
    """
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
