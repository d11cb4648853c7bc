"""Weights of 8 bits: the matrices of the blocks as int8 with one scale a row, computed in the model's own dtype.

The weights are half as large as in bfloat16, so a GPU that draws one picture, and reads all of them for every code, has
half to read (with the engine "compile", which multiplies them as they are). On a CPU it saves room on the disk and in
memory alone: `fused_step` makes them float32 again.
"""

from __future__ import annotations

from torch import Tensor

from generation.transformer.model import Block, Transformer


def quantise(model: Transformer) -> Transformer:
    """Round the matrices of the blocks to 8 bits, in place. Raises `ValueError` where torchao is missing."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError("weights of 8 bits need torchao: pip install 'mmwudao[int8]'") from error
    quantize_(model.blocks, Int8WeightOnlyConfig())
    return model


def is_quantised(model: Transformer) -> bool:
    """Whether `quantise` has been at the model."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    return type(block.attention.qkv.weight.data) is not Tensor


def full_weight(weight: Tensor) -> Tensor:
    """A weight as an ordinary tensor: of 8 bits as the numbers that they stand for."""
    return weight.data if type(weight.data) is Tensor else weight.dequantize()
