"""Attention over packed rows: rows of any length behind one another, without padding, none of which sees another.

The score matrix is block-diagonal, and only its blocks are computed. On CUDA one kernel does so: xformers' with its
`BlockDiagonalCausalMask` (extra `gpu`) where it is installed, else PyTorch's own FlashAttention for variable lengths.
Elsewhere, and where these kernels do not apply, the rows are computed one by one.
Shapes: T tokens of all rows, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Kernel = Literal["xformers", "varlen", "rows"]


@dataclass(frozen=True)
class Packing:
    """Rows of `lengths` tokens. `biases`, one [1, 1, t, t] a row, are added to the scores; None: all are causal."""

    lengths: tuple[int, ...]
    kernel: Kernel
    offsets: Tensor | None = None  # int32 [rows + 1], where each row starts and ends; for "varlen"
    longest: int = 0  # at least the longest row; for "varlen"
    mask: Any = None  # for "xformers"
    biases: tuple[Tensor, ...] | None = None  # for "rows"
    uncompiled: Callable[..., Tensor] | None = None  # run outside of compiled code; for "rows" and "xformers"


def make_packing(
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    biases: Sequence[Tensor] | None = None,
    plain: bool = True,
) -> Packing:
    """The packing of rows of `lengths` for attention in `dtype`; `plain`: neither dropout nor PB-relax."""
    lengths = tuple(lengths)
    if biases is not None or not plain or device.type != "cuda":
        return _by_rows(lengths, None if biases is None else tuple(biases))
    if _installed("xformers"):
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

        mask = BlockDiagonalCausalMask.from_seqlens(list(lengths))
        return Packing(lengths, "xformers", mask=mask, uncompiled=_uncompiled(_xformers_attention))
    if _installed("torch.nn.attention.varlen") and dtype in (torch.float16, torch.bfloat16):
        return varlen_packing(lengths, device)
    return _by_rows(lengths, None)


def varlen_packing(lengths: tuple[int, ...], device: torch.device) -> Packing:
    """The packing that PyTorch's kernel for variable lengths takes."""
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    # rounded, because torch.compile may compile again for every new integer
    return Packing(lengths, "varlen", offsets=offsets, longest=-(-max(lengths) // 128) * 128)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, attend: Attend) -> Tensor:
    """Attention [1, H, T, d] within each row; `attend(q, k, v, bias)` is that of one row, without bias causal."""
    if packing.kernel == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        offsets, longest = packing.offsets, packing.longest
        assert offsets is not None
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, H, d]
        mixed = varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0))  # 0 ahead: causal
        assert isinstance(mixed, Tensor)
        return mixed.transpose(0, 1).unsqueeze(0)
    assert packing.uncompiled is not None
    if packing.kernel == "xformers":
        return packing.uncompiled(q, k, v, packing.mask)
    return packing.uncompiled(q, k, v, packing, attend)


def _by_rows(lengths: tuple[int, ...], biases: tuple[Tensor, ...] | None) -> Packing:
    # the lengths differ from batch to batch: torch.compile would unroll the loop and compile again each time
    return Packing(lengths, "rows", biases=biases, uncompiled=_uncompiled(_attention_by_row))


@cache
def _uncompiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # not a decorator, which would import PyTorch's compiler (seconds) for drawing too
    return torch.compiler.disable(function)


def _attention_by_row(q: Tensor, k: Tensor, v: Tensor, packing: Packing, attend: Attend) -> Tensor:
    queries, keys, values = (x.split(packing.lengths, dim=2) for x in (q, k, v))
    biases = packing.biases or [None] * len(packing.lengths)
    return torch.cat([attend(*row) for row in zip(queries, keys, values, biases, strict=True)], dim=2)


def _xformers_attention(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [1, T, H, d]
    return memory_efficient_attention(q, k, v, attn_bias=mask).transpose(1, 2)


@cache
def _installed(module: str) -> bool:
    return find_spec(module) is not None
