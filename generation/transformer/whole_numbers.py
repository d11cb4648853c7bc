"""Products with weights of 8 bits on a CPU, in whole numbers: a row has the same bits in any company.

The quantised product of PyTorch rounds all rows of a call to one scale. Here each row is rounded by itself, to 14 bits:
128 times a row of 7 bits and another of 7, whose products with the weights are exact, and are added up. 7 bits because
without VNNI a CPU adds up two products of 8 in 16 bits, which overflow.

Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST, MOST = -64, 63  # of a row of 7 bits
LARGEST = 128 * MOST  # of a row of 14 bits


class WholeNumberLinear(nn.Module):
    """A linear layer for inference, whose weights are kept in the one layout that they are multiplied in."""

    def __init__(self, numbers: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        """`numbers` [O, I] int8 and `scales` [O] float32; `multiplies_whole_numbers` must hold."""
        super().__init__()
        self.out_features, self.in_features = numbers.shape
        self._packed, self.bias = _packed(numbers, scales), bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x.flatten(0, -2).float()).view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """Float32 [R, O] of float32 `x` [R, I], without the bias."""
        step = x.abs().amax(dim=1, keepdim=True).div_(LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)
        whole = (x / step).round_()
        high = whole.add(64).div_(128).floor_()
        halves = F.pad(torch.cat([high, whole.sub_(high, alpha=128)]), (0, 2))
        # what two more inputs with weights of zero are for: every call then rounds to steps of 1
        halves[:, -2], halves[:, -1] = LEAST, MOST
        product: Tensor = torch.ops.quantized.linear_dynamic(halves, self._packed, True)
        high, low = product.chunk(2)
        return low.add_(high, alpha=128).mul_(step)


@cache
def multiplies_whole_numbers() -> bool:
    """Whether this CPU and PyTorch do so exactly. Tried once, with the largest numbers and many counts of rows."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-128, 128, (72, 1000), generator=generator, dtype=torch.int8)
    numbers[::3], numbers[1::3] = 127, -128
    x = torch.randint(-LARGEST, LARGEST + 1, (33, 1000), generator=generator).float()
    x[::3], x[:, 0] = LARGEST, LARGEST  # so that a step is 1
    try:
        layer = WholeNumberLinear(numbers, torch.ones(72))
        found = layer.multiply(x)
        parts = [layer.multiply(x[:rows]) for rows in (1, 2, 3, 4, 8, 16)]
    except (RuntimeError, AttributeError):  # this PyTorch has no such product
        return False
    # sums beyond 24 bits are rounded when they become float32
    near = torch.allclose(found.double(), x.double() @ numbers.double().T, rtol=1e-6, atol=1e3)
    return near and all(torch.equal(part, found[: len(part)]) for part in parts)


def _packed(numbers: Tensor, scales: Tensor) -> Any:
    wide = F.pad(numbers, (0, 2))
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"  # it is the packed weights' for good
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # such tensors will be removed; then the trial says so
            zeros = torch.zeros(len(wide), dtype=torch.int64)
            weight = torch._make_per_channel_quantized_tensor(wide, scales.double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(weight, None)
    finally:
        torch.backends.quantized.engine = engine
