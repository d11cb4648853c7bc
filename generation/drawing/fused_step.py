"""One decoding step on a CPU in a quarter of the operations that the modules take.

With one token a row a step is small: its time depends on how many operations PyTorch starts and how often the weights
are read. So the step of one structure (`can_fuse`) is written out here: matrices in the layout that is read fastest
with the same bits for any number of rows (`products`); keys and values stored by one copy each; the weights of norms
multiplied with what follows beforehand. It gives the numbers of `Transformer.forward` up to float32 rounding.

The matrices are float32 whatever dtype the model is stored in: a product of few rows costs a read of the weights and a
call, and without AMX the float32 call is faster. Weights of 8 bits are the exception: they are multiplied in whole
numbers (`generation.transformer.whole_numbers`), or as they are stored, with activations rounded to bfloat16.

Shapes: R rows, D width, H heads of queries, K of keys, d = D / H, T slots of the cache filled so far, S codes of a
picture, N image codes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.drawing.products import Product, eight_bit_product, make_product, multiplies_eight_bits
from generation.transformer.cache import KVCache
from generation.transformer.config import TransformerConfig
from generation.transformer.int8 import full_weight, is_quantised, stored_eight_bits
from generation.transformer.model import MLP, Block, CodeHead, Transformer
from generation.transformer.whole_numbers import WholeNumberLinear

MOST_NUMBERS = 2**27  # 512 MiB


def can_fuse(model: Transformer) -> bool:
    """Whether `FusedStep` supports the model: much like `TransformerConfig.modern`, on a CPU, not too large."""
    # an adapter or a library may have replaced layers
    plain = all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))
    numbers = fused_numbers(model.config, is_quantised(model))
    return plain and numbers > 0 and model.embed.weight.device.type == "cpu"


def fused_numbers(config: TransformerConfig, eight_bits: bool = False) -> int:
    """How many numbers `FusedStep` copies to float32; 0 for a model that it does not support, or that is too large.

    With `eight_bits` the matrices of the blocks are multiplied as they are stored.
    """
    known = (
        config.norm == "rmsnorm"
        and config.mlp == "swiglu"
        and config.position in ("rotary_2d", "rotary_1d", "rotary_codes")
        and not (config.sandwich or config.bias or config.pb_relax or config.experts.used)
    )
    heads = 2 * config.heads + 2 * config.key_heads
    block = config.width * (heads * config.head_width + 3 * config.hidden_width)
    if eight_bits and multiplies_eight_bits(config.width, config.hidden_width):
        block = 0
    hidden = config.width if config.image_head == "mlp" else 0
    count = config.depth * block + (hidden + config.num_image_codes) * config.width
    return count if known and count <= MOST_NUMBERS else 0


class FusedStep:
    """An `engines.Step` for the models that `can_fuse` accepts."""

    def __init__(self, model: Transformer, positions: Tensor, cache: KVCache) -> None:
        """`positions` [R, S, 2] or [R, S] are those of the codes; the float32 `cache` ends before the first of them."""
        config = model.config
        assert can_fuse(model)
        assert cache.keys.dtype == torch.float32
        self._cache, self._heads, self._keys = cache, config.heads, config.key_heads
        self._head_width = config.head_width
        self._embed = model.embed.weight
        # rotate(x) = x * [cos, cos] + [second half, first half] * [-sin, sin]
        tables = (model.angles_cos, model.angles_sin)
        cos, sin = (table[positions].flatten(2).float() for table in tables)  # [R, S, d/2]
        self._cos = torch.cat([cos, cos], dim=-1)[:, :, None]  # [R, S, 1, d]
        self._sin = torch.cat([-sin, sin], dim=-1)[:, :, None]
        self._norms_qk = config.qk_norm
        self._layers = [
            _Layer(block, config, keys, values)
            for block, keys, values in zip(model.blocks, cache.keys, cache.values, strict=True)
            if isinstance(block, Block)
        ]
        if config.image_head == "mlp":
            self._head = _two_layers(model.code_head, model.norm.weight)
        else:
            head = model.embed.weight if config.tie_embeddings else model.head.weight
            self._head = _product(head[: config.num_image_codes], model.norm.weight)
        # tensors, because every operation would convert a Python number to one
        self._eps = torch.tensor(config.norm_eps)
        self._shares = {size: torch.tensor(1 / size) for size in (config.width, config.head_width)}

    def __call__(self, codes: Tensor, place: int) -> Tensor:
        """Logits [R, N] of the code after `codes` [R], each number `place` of its picture; the cache grows by them."""
        cache, rows, heads, keys, width = self._cache, len(codes), self._heads, self._keys, self._head_width
        slot, end = cache.used, cache.used + 1
        cos, sin = self._cos[:, place], self._sin[:, place]
        bias = cache.bias(1)[:, 0].expand(rows, keys, end).reshape(rows * keys, 1, end)
        x = self._embed[codes].float()
        for layer in self._layers:
            qkv = layer.qkv(self._normed(x)).view(rows, heads + 2 * keys, width)
            qk = self._normed(qkv[:, :-keys]) if self._norms_qk else qkv[:, :-keys]
            qk = torch.addcmul(qk * (layer.qk_norm * cos), qk.roll(width // 2, -1), layer.qk_norm_turned * sin)
            layer.keys[:, :, slot] = qk[:, heads:]
            layer.values[:, :, slot] = qkv[:, -keys:]
            # those that share a head of keys are its queries
            q = qk[:, :heads].reshape(rows * keys, heads // keys, width)
            scores = torch.baddbmm(bias, q, layer.flat_keys[:, :, :end])
            attended = torch.bmm(scores.softmax(-1), layer.flat_values[:, :end])
            x = x + layer.attention_project(attended.view(rows, heads * width))
            gate, up = layer.expand(self._normed(x)).chunk(2, dim=-1)
            x = x + layer.mlp_project(F.silu(gate) * up)
        cache.advance(1)
        return self._head(self._normed(x))

    def _normed(self, x: Tensor) -> Tensor:
        """x over its root mean square along the last axis: `nn.RMSNorm` without its weight, in half the operations."""
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        return x * torch.addcmul(self._eps, squares, self._shares[x.shape[-1]]).rsqrt_()


class _Layer:
    """The products of a block, in which the weights of its norms are multiplied, and its part of the cache."""

    def __init__(self, block: Block, config: TransformerConfig, keys: Tensor, values: Tensor) -> None:
        attention, mlp, head_width = block.attention, block.mlp, config.head_width
        assert isinstance(mlp, MLP)
        self.qkv = _layer_product(attention.qkv, block.attention_norm.weight)
        self.attention_project = _layer_product(attention.project)
        self.expand = _layer_product(mlp.expand, block.mlp_norm.weight)
        self.mlp_project = _layer_product(mlp.project)
        # that of q with the softmax's 1 / sqrt(d)
        ones = torch.ones(head_width)
        norms = [_float(norm.weight) if config.qk_norm else ones for norm in (attention.q_norm, attention.k_norm)]
        norms[0] = norms[0] / math.sqrt(head_width)
        q_norm, k_norm = norms
        self.qk_norm = torch.cat([q_norm.expand(config.heads, -1), k_norm.expand(config.key_heads, -1)])  # [H + K, d]
        self.qk_norm_turned = self.qk_norm.roll(head_width // 2, -1)
        self.keys, self.values = keys, values  # [R, K, T, d]
        self.flat_keys, self.flat_values = keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)


def _layer_product(layer: nn.Module, norm: object = None) -> Product:
    """As `_product`, of a layer without a bias."""
    if not isinstance(layer, WholeNumberLinear):
        return _product(layer.weight, norm)
    multiply = layer.multiply
    if norm is None:
        return multiply
    scale = _float(norm)
    return lambda x: multiply(x * scale)


def _product(weight: object, norm: object = None) -> Product:
    """The product with a matrix [out, in], the weights [in] of the norm before it multiplied in."""
    assert isinstance(weight, Tensor)
    eight_bits = stored_eight_bits(weight)
    if eight_bits is not None and multiplies_eight_bits(weight.shape[1], weight.shape[0]):
        product = eight_bit_product(*eight_bits)
        if norm is None:
            return product
        scale = _float(norm)
        return lambda x: product(x * scale)
    matrix = _float(weight)
    return make_product(matrix if norm is None else matrix * _float(norm))


def _two_layers(head: CodeHead, norm: object) -> Product:
    """The head of the codes with a layer between, the weights of the norm before it multiplied in."""
    expand, project = _product(head.expand.weight, norm), _product(head.project.weight)
    between, last = _float(head.expand.bias), _float(head.project.bias)
    return lambda x: project(F.gelu(expand(x) + between)) + last


def _float(weight: object) -> Tensor:
    assert isinstance(weight, Tensor)
    return full_weight(weight).float()
