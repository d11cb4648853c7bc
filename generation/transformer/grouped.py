"""Products of rows that are sorted by group with a matrix for each group: by one operation of PyTorch, or by a loop."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_product(x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """[n, O] of rows `x` [n, I] sorted by group, `counts` [G] of each, and a matrix a group, `weights` [G, O, I]."""
    weights = weights.to(x.dtype)
    # strides that are no multiple of 16 bytes are refused
    aligned = all(size * x.element_size() % 16 == 0 for size in weights.shape[1:])
    if aligned and grouped_works(x.device.type, x.dtype):
        return F.grouped_mm(x, weights.transpose(-2, -1), offs=counts.cumsum(0).to(torch.int32))
    parts = zip(x.split(counts.tolist()), weights.unbind(0), strict=True)
    return torch.cat([F.linear(part, weight) for part, weight in parts])


@cache
def grouped_works(device: str, dtype: torch.dtype) -> bool:
    """Whether this PyTorch multiplies groups in one operation on a device, forward and backward; a trial tells."""
    # in a thread of its own: what is around here (autocast, gradient checkpointing, no_grad) would take part in it
    with ThreadPoolExecutor(1) as other:
        return other.submit(_try_grouped, device, dtype).result()


def _try_grouped(device: str, dtype: torch.dtype) -> bool:
    shapes = ((16, 16), (2, 16, 16))
    x, weights = (torch.ones(*shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes)
    try:
        offsets = torch.tensor([4, 16], dtype=torch.int32, device=device)
        y = F.grouped_mm(x, weights.transpose(-2, -1), offs=offsets)
        torch.autograd.grad(y, (x, weights), torch.ones_like(y))
    except (RuntimeError, AttributeError, ValueError):
        return False
    return True
