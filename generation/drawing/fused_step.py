"""One decoding step on a CPU in a quarter of the operations that the modules take.

With one token a row a step is small: its time depends on how many operations PyTorch starts and how often the weights
are read. So the step of one structure (`can_fuse`) is written out here: float32 matrices in the layout that `addmm`
reads fastest, which adds the residual too; keys and values stored by one copy each; the rotation multiplied with the
weights of the q and k norms beforehand. It gives the numbers of `Transformer.forward` up to float32 rounding.

The matrices are float32 whatever dtype the model is stored in: a product of few rows costs a read of the weights and a
call, and without AMX the float32 call is faster.

Shapes: R rows, D width, H heads, d = D / H, T slots of the cache filled so far, S codes of a picture, N image codes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.transformer.cache import KVCache
from generation.transformer.config import TransformerConfig
from generation.transformer.int8 import full_weight
from generation.transformer.model import Block, Transformer

MOST_NUMBERS = 2**27  # 512 MiB


def can_fuse(model: Transformer) -> bool:
    """Whether `FusedStep` supports the model: the structure of `TransformerConfig.modern`, on a CPU, not too large."""
    # an adapter or a library may have replaced layers
    plain = all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))
    return plain and fused_numbers(model.config) > 0 and model.embed.weight.device.type == "cpu"


def fused_numbers(config: TransformerConfig) -> int:
    """How many numbers `FusedStep` copies to float32; 0 for a model that it does not support, or that is too large."""
    known = (
        config.norm == "rmsnorm"
        and config.qk_norm
        and config.mlp == "swiglu"
        and config.position == "rotary_2d"
        and not (config.sandwich or config.bias or config.pb_relax)
    )
    block = config.width * (4 * config.width + 3 * config.hidden_width)
    count = config.depth * block + config.num_image_codes * config.width
    return count if known and count <= MOST_NUMBERS else 0


class FusedStep:
    """An `engines.Step` for the models that `can_fuse` accepts."""

    def __init__(self, model: Transformer, positions: Tensor, cache: KVCache) -> None:
        """`positions` [R, S, 2] are those of the codes; the `cache` (float32) is filled up to the first of them."""
        config = model.config
        assert can_fuse(model)
        assert cache.keys.dtype == torch.float32
        self._cache, self._heads, self._head_width = cache, config.heads, config.head_width
        self._embed = model.embed.weight
        # rotate(x) = x * [cos, cos] + [second half, first half] * [-sin, sin]
        cos, sin = (table[positions].flatten(-2).float() for table in (model.angles_cos, model.angles_sin))
        self._cos = torch.cat([cos, cos], dim=-1)[:, :, None, None]  # [R, S, 1, 1, d]
        self._sin = torch.cat([-sin, sin], dim=-1)[:, :, None, None]
        self._layers = [
            _Layer(block, config.head_width, keys, values)
            for block, keys, values in zip(model.blocks, cache.keys, cache.values, strict=True)
            if isinstance(block, Block)
        ]
        head = model.embed.weight if config.tie_embeddings else model.head.weight
        self._head = _columns(head[: config.num_image_codes], model.norm.weight)
        # tensors, because every operation would convert a Python number to one
        self._eps = torch.tensor(config.norm_eps)
        self._shares = {size: torch.tensor(1 / size) for size in (config.width, config.head_width)}

    def __call__(self, codes: Tensor, place: int) -> Tensor:
        """Logits [R, N] of the code after `codes` [R], each number `place` of its picture; the cache grows by them."""
        cache, rows, heads, width = self._cache, len(codes), self._heads, self._head_width
        slot, end = cache.used, cache.used + 1
        cos, sin = self._cos[:, place], self._sin[:, place]
        bias = cache.bias(1)[:, 0].expand(rows, heads, end).reshape(rows * heads, 1, end)
        x = self._embed[codes].float()
        for layer in self._layers:
            qkv = (self._normed(x) @ layer.qkv).view(rows, 3, heads, width)
            qk = self._normed(qkv[:, :2])
            qk = torch.addcmul(qk * (layer.qk_norm * cos), qk.roll(width // 2, -1), layer.qk_norm_turned * sin)
            layer.keys[:, :, slot] = qk[:, 1]
            layer.values[:, :, slot] = qkv[:, 2]
            q = qk[:, 0].reshape(rows * heads, 1, width)
            scores = torch.baddbmm(bias, q, layer.flat_keys[:, :, :end])
            attended = torch.bmm(scores.softmax(-1), layer.flat_values[:, :end])
            x = torch.addmm(x, attended.view(rows, heads * width), layer.attention_project)
            gate, up = (self._normed(x) @ layer.expand).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate) * up, layer.mlp_project)
        cache.advance(1)
        return self._normed(x) @ self._head

    def _normed(self, x: Tensor) -> Tensor:
        """x over its root mean square along the last axis: `nn.RMSNorm` without its weight, in half the operations."""
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        return x * torch.addcmul(self._eps, squares, self._shares[x.shape[-1]]).rsqrt_()


class _Layer:
    """The weights of a block in float32, multiplied with those of its norms, and its part of the cache."""

    def __init__(self, block: Block, head_width: int, keys: Tensor, values: Tensor) -> None:
        attention, mlp = block.attention, block.mlp
        self.qkv = _columns(attention.qkv.weight, block.attention_norm.weight)
        self.attention_project = _columns(attention.project.weight)
        self.expand = _columns(mlp.expand.weight, block.mlp_norm.weight)
        self.mlp_project = _columns(mlp.project.weight)
        # that of q with the softmax's 1 / sqrt(d)
        norms = [_float(attention.q_norm.weight) / math.sqrt(head_width), _float(attention.k_norm.weight)]
        self.qk_norm = torch.stack(norms)[:, None]  # [2, 1, d]
        self.qk_norm_turned = self.qk_norm.roll(head_width // 2, -1)
        self.keys, self.values = keys, values  # [R, H, T, d]
        self.flat_keys, self.flat_values = keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)


def _columns(weight: object, norm: object = None) -> Tensor:
    """A matrix [out, in] as [in, out], the weights [in] of the norm before it multiplied in."""
    matrix = _float(weight).t()
    if norm is not None:
        matrix = matrix * _float(norm)[:, None]
    return matrix.contiguous()


def _float(weight: object) -> Tensor:
    assert isinstance(weight, Tensor)
    return full_weight(weight).float()
