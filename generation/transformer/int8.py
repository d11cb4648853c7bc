"""Weights of 8 bits: the matrices of the blocks as int8 with one scale a row, computed in the model's own dtype.

The weights are half as large as in bfloat16. A GPU that draws one picture reads all of them for every code, so half as
much (with the engine "compile", which multiplies them as they are). On a CPU they only save space on disk and in
memory: `fused_step` turns them back into float32.
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
    """Whether the matrices of the blocks are 8-bit, as `quantise` makes them."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    return type(block.attention.qkv.weight.data) is not Tensor


def full_weight(weight: Tensor) -> Tensor:
    """A weight as an ordinary tensor; 8-bit numbers are scaled back to the values they stand for."""
    return weight.data if type(weight.data) is Tensor else weight.dequantize()
