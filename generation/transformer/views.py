"""Views: which tokens each token of one forward pass sees, and the kernel that computes its attention to them.

`choose_view` chooses once for each pass; blocks call `View.at` and `View.attend` and know no more of it:

* `DenseView`: a token sees all before it in its row, or what a bias of the pass lets it see;
* `CachedView`: the new tokens follow those in a `KVCache`; `OneTokenView`: one new token a row, on a CPU;
* `PackedView`: rows behind one another in one row (`generation.rows.row.pack`), each sees itself alone;
* `FlexView`: rows with levels or segments on CUDA, packed or not, by FlexAttention;
* `PivotView`: three regions of a long row (`generation.transformer.sparse`), in training.

Shapes: B rows, H heads, K heads of keys and values, T tokens, d head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from generation.transformer.attention import (
    DenseAttention,
    Rotation,
    repeat_heads,
    single_query_attention,
)
from generation.transformer.cache import KVCache
from generation.transformer.config import TransformerConfig
from generation.transformer.packing import Packing, make_packing, packed_attention
from generation.transformer.sparse import draw_pivots, sparse_attention
from generation.transformer.visibility import Visibility


@dataclass
class Inputs:
    """What a pass is given: `tokens` [B, T], the dtype of its products, and what restricts who sees whom.

    `cache`, `levels`, `segments` and `lengths` are those of `Transformer.forward`. `rotation` is None where positions
    are learned.
    """

    tokens: Tensor
    dtype: torch.dtype
    rotation: Rotation | None = None
    cache: KVCache | None = None
    segments: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    levels: Tensor | None = None

    @property
    def visibility(self) -> Visibility | None:
        """Who sees whom, where the order of the tokens does not say it."""
        if self.levels is None and self.segments is None:
            return None
        return Visibility.of(self.tokens, self.levels, self.segments, self.lengths)


class View(ABC):
    """What the tokens of one pass see of each other, and how their queries and keys are rotated (None: not at all)."""

    def __init__(self, dense: DenseAttention, rotation: Rotation | None) -> None:
        self.dense, self.rotation = dense, rotation

    def at(self, layer: int) -> View:
        """The view of one layer. Called outside of what is compiled or checkpointed: random choices are made here."""
        return self

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention [B, H, T, d] of the tokens: `q` [B, H, T, d], `k` and `v` [B, K, T, d], `q` and `k` rotated."""


def choose_view(inputs: Inputs, dense: DenseAttention) -> View:
    """The view of a pass. A cache decides first, then levels and segments, then packed rows; else it may be sparse.

    Sparse attention is for training. A row inside its windows sees all of itself, which is dense attention.
    """
    tokens, config = inputs.tokens, dense.config
    if inputs.cache is not None:
        assert inputs.segments is None
        if inputs.levels is not None:
            return CachedView(dense, inputs.rotation, inputs.cache, inputs.cache.first_bias(inputs.levels))
        # the fused CPU kernel is made for many queries: with one it takes 3 times as long as two products
        one = tokens.shape[1] == 1 and tokens.device.type == "cpu" and not config.pb_relax
        return (OneTokenView if one else CachedView)(
            dense, inputs.rotation, inputs.cache, inputs.cache.bias(tokens.shape[1])
        )
    visibility = inputs.visibility
    if visibility is not None and tokens.device.type == "cuda" and dense.plain:
        return FlexView(dense, inputs.rotation, visibility.block_mask())
    if inputs.lengths is not None:
        biases = None if visibility is None else [one.bias() for one in visibility.split(inputs.lengths)]
        packing = make_packing(inputs.lengths, tokens.device, inputs.dtype, biases, dense.plain)
        return PackedView(dense, inputs.rotation, packing)
    if visibility is not None:
        return DenseView(dense, inputs.rotation, visibility.bias())
    if dense.training and 0 < config.sparse_window * config.sparse_windows < tokens.shape[1]:
        return PivotView(dense, inputs.rotation, tokens)
    return DenseView(dense, inputs.rotation)


class DenseView(View):
    """Every token sees those before it in its row and itself; with a `bias` [B, 1, T, T], what that leaves."""

    def __init__(self, dense: DenseAttention, rotation: Rotation | None, bias: Tensor | None = None) -> None:
        super().__init__(dense, rotation)
        self._bias = bias

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.dense(q, k, v, self._bias)


class CachedView(View):
    """The tokens follow those in `cache`, to which their keys and values are added; `bias` is the cache's."""

    def __init__(self, dense: DenseAttention, rotation: Rotation | None, cache: KVCache, bias: Tensor) -> None:
        super().__init__(dense, rotation)
        self._cache, self._bias, self._layer = cache, bias, 0

    def at(self, layer: int) -> View:
        # the same object: without gradients no layer is computed again
        self._layer = layer
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self._cache.store(self._layer, k, v)
        mixed = self._cache.attend(self._layer, q)
        return self._attend(q, k, v) if mixed is None else mixed

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.dense(q, k.to(q.dtype), v.to(q.dtype), self._bias)


class OneTokenView(CachedView):
    """A `CachedView` of one new token a row, by two products in the dtype of the cache."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return single_query_attention(q, k, v, self._bias)


class PackedView(View):
    """Rows behind one another, B = 1: a token sees what it would see in its own row."""

    def __init__(self, dense: DenseAttention, rotation: Rotation | None, packing: Packing) -> None:
        super().__init__(dense, rotation)
        self._packing = packing

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        return packed_attention(q, k, v, self._packing, self.dense)


class FlexView(View):
    """Rows, packed or not, in which a `BlockMask` says who sees whom (`visibility.Visibility.block_mask`)."""

    def __init__(self, dense: DenseAttention, rotation: Rotation | None, block_mask: Any) -> None:
        super().__init__(dense, rotation)
        self._block_mask = block_mask

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        return _flex_attention(q.device.type)(q, k, v, block_mask=self._block_mask)


class PivotView(View):
    """Every token sees a window of the latest tokens and pivots before it, which each layer draws for itself."""

    def __init__(
        self, dense: DenseAttention, rotation: Rotation | None, tokens: Tensor, pivots: Tensor | None = None
    ) -> None:
        super().__init__(dense, rotation)
        self._tokens, self._pivots = tokens, pivots

    def at(self, layer: int) -> View:
        # another object: with gradient checkpointing a layer is computed again, and must find its own pivots
        pivots = draw_pivots(self._tokens, *_pivot_settings(self.dense.config))
        return PivotView(self.dense, self.rotation, self._tokens, pivots)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self._pivots is not None, "the view of a layer attends, see `at`"
        sizes = self.dense.config.sparse_window, self.dense.config.sparse_windows
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        # recomputed in the backward pass: what is gathered for the blocks is many times as large as k and v
        mixed = checkpoint(sparse_attention, q, k, v, self._pivots, *sizes, self.dense, use_reentrant=False)
        assert isinstance(mixed, Tensor)
        return mixed


@cache
def _flex_attention(device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # uncompiled, it computes all scores; compiled, it has no backward pass on a CPU
    attention: Callable[..., Any] = flex_attention
    return torch.compile(attention, dynamic=True) if device == "cuda" else attention


def _pivot_settings(config: TransformerConfig) -> tuple[int, int, int]:
    """Image codes, the padding id, and the number of pivots."""
    return config.num_image_codes, config.vocabulary.command("[PAD]"), config.sparse_pivots
