"""Weights of 8 bits: the matrices of the blocks as int8 with one scale a row, computed in the model's own dtype.

The weights are half as large as in bfloat16. A GPU that draws one picture reads all of them for every code, so half as
much (with the engine "compile", which multiplies them as they are). On a CPU `fused_step` multiplies them as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from generation.transformer.model import Block, Transformer
from generation.transformer.whole_numbers import WholeNumberLinear, multiplies_whole_numbers


def quantise(model: Transformer, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Transformer:
    """Round the matrices of the blocks to 8 bits, in place. Raises `ValueError` for experts, and without torchao.

    The model moves to `device` and `dtype` block by block, so that no more than one block is there in full.
    """
    if model.config.experts.used:
        raise ValueError("weights of 8 bits are not made for experts: leave this generator in bfloat16 or float32")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError("weights of 8 bits need torchao: pip install 'mmwudao[int8]'") from error
    for block in model.blocks:
        quantize_(block.to(device=device, dtype=dtype), Int8WeightOnlyConfig())
        _multiply_whole_numbers(block)
    return model.to(device=device, dtype=dtype)


def _multiply_whole_numbers(block: nn.Module) -> None:
    """On a CPU that can, replace the block's layers by such that take whole numbers."""
    for module in list(block.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is not nn.Linear or layer.weight.device.type != "cpu":
                continue
            stored = stored_eight_bits(layer.weight)
            if stored is not None and multiplies_whole_numbers():
                setattr(module, name, WholeNumberLinear(*stored, layer.bias))


def is_quantised(model: Transformer) -> bool:
    """Whether the matrices of the blocks are 8-bit, as `quantise` makes them."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    layer: nn.Module = block.attention.qkv
    return isinstance(layer, WholeNumberLinear) or type(block.attention.qkv.weight.data) is not Tensor


def full_weight(weight: Tensor) -> Tensor:
    """A weight as an ordinary tensor; 8-bit numbers are scaled back to the values they stand for."""
    return weight.data if type(weight.data) is Tensor else weight.dequantize()


def stored_eight_bits(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """The numbers, int8 [out, in], and scales, float32 [out], of a weight that `quantise` made; None for another."""
    data = weight.data
    if type(data) is Tensor:
        return None
    numbers, scale = getattr(data, "qdata", None), getattr(data, "scale", None)
    # libraries store 8 bits in more than one way: one scale a row and no offset is the one that is known here
    if not isinstance(numbers, Tensor) or not isinstance(scale, Tensor) or scale.numel() != len(numbers):
        return None
    offsets = getattr(data, "zero_point", None)
    if numbers.dtype != torch.int8 or (offsets is not None and bool(offsets.any())):
        return None
    return numbers.contiguous(), scale.flatten().float()
