"""The decoder-only transformer over text pieces and image codes.

One file, two presets: `TransformerConfig.cogview` (Ding et al. 2021, arXiv:2105.13290, section 2: Sandwich-LN,
GELU, learned 1-D positions) and `TransformerConfig.modern` (RMSNorm, rotary 2-D positions, QK-norm, SwiGLU).

Shapes: B rows, T tokens, D width, H heads, d = D / H, V vocabulary (padded), N image codes.
"""

import math
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from generation.rows.row import COMMANDS_IN_ROW, PositionKind, RowBatch
from generation.rows.vocabulary import Vocabulary
from generation.transformer.attention import relaxed_attention, rotate, segment_bias, single_query_attention
from generation.transformer.packing import Packing, make_packing, packed_attention
from generation.transformer.sparse import draw_pivots, sparse_attention

# Annotations stay objects here (no `from __future__ import annotations`): the hub mixin reads the type of `config`
# from the signature of `Transformer.__init__` to rebuild it from config.json.


@dataclass
class TransformerConfig:
    """Sizes and choices. `max_text` counts text pieces, `grid` is (h, w) of the largest picture in codes."""

    num_image_codes: int = 1024
    num_text_pieces: int = 4096
    width: int = 384
    depth: int = 8
    heads: int = 6
    max_text: int = 48
    grid: tuple[int, int] = (16, 16)
    norm: Literal["layernorm", "rmsnorm", "max_scaled_layernorm"] = "rmsnorm"  # the last: see MaxScaledLayerNorm
    norm_eps: float = 1e-5
    sandwich: bool = False  # a second norm after each branch, before it is added (CogView section 2.4)
    mlp: Literal["gelu", "swiglu"] = "swiglu"
    mlp_width: int = 0  # 0: 4 x width for gelu; 8/3 x width, rounded to 64, for swiglu (the same parameter count)
    position: Literal["sequence", "learned_2d", "rotary_2d"] = "rotary_2d"
    rotary_base: float = 10000.0
    qk_norm: bool = True
    pb_relax: float = 0.0  # alpha of precision-bottleneck relaxation; 0: plain attention
    # attention over three regions while training (`generation.transformer.sparse`); 0: dense. Dense in eval mode and with a cache
    sparse_window: int = 0
    sparse_windows: int = 4  # the published settings: 64, 4, 256
    sparse_pivots: int = 256
    bias: bool = False
    dropout: float = 0.0
    tie_embeddings: bool = True
    image_softmax: Literal["codes", "full"] = "codes"  # the softmax of the image loss: over N codes, or over V ids
    tokenizer_hash: str = ""  # content hashes of the parts this model was trained with
    text_hash: str = ""

    def __post_init__(self) -> None:
        height, width = self.grid
        self.grid = (int(height), int(width))  # JSON has only lists
        if min(self.width, self.depth, self.heads, self.num_image_codes, self.num_text_pieces, *self.grid) < 1:
            raise ValueError("width, depth, heads, grid and both vocabulary sizes must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}")
        if self.position == "rotary_2d" and self.head_width % 4:
            raise ValueError(f"rotary_2d needs width / heads to be a multiple of 4, not {self.head_width}")
        if self.max_text < 0 or self.pb_relax < 0 or not 0 <= self.dropout < 1:
            raise ValueError("max_text and pb_relax must not be negative, and dropout must lie in [0, 1)")
        if self.sparse_window < 0 or min(self.sparse_windows, self.sparse_pivots) < 1:
            raise ValueError("sparse_window must be 0 (dense) or more, sparse_windows and sparse_pivots at least 1")

    @classmethod
    def cogview(cls, **overrides: Any) -> "TransformerConfig":
        """The structure of CogView: Sandwich-LN, LayerNorm, GELU (tanh), learned 1-D positions, biases, tied."""
        preset = {
            "norm": "layernorm",
            "sandwich": True,
            "mlp": "gelu",
            "position": "sequence",
            "qk_norm": False,
            "bias": True,
            "tie_embeddings": True,
        }
        return cls(**{**preset, **overrides})

    @classmethod
    def modern(cls, **overrides: Any) -> "TransformerConfig":
        """RMSNorm before each branch, rotary 2-D positions, QK-norm, SwiGLU, no biases, tied."""
        preset = {
            "norm": "rmsnorm",
            "sandwich": False,
            "mlp": "swiglu",
            "position": "rotary_2d",
            "qk_norm": True,
            "bias": False,
            "tie_embeddings": True,
        }
        return cls(**{**preset, **overrides})

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.num_image_codes, self.num_text_pieces)

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden_width(self) -> int:
        """Width inside the MLP."""
        if self.mlp_width:
            return self.mlp_width
        return 4 * self.width if self.mlp == "gelu" else max(64, round(self.width * 8 / 3 / 64) * 64)

    @property
    def max_length(self) -> int:
        """Tokens of the longest row, [EOI1] included."""
        return self.max_text + self.grid[0] * self.grid[1] + COMMANDS_IN_ROW

    @property
    def position_kind(self) -> PositionKind:
        """Which positions the rows need (`rows.draw.row_positions`)."""
        return "sequence" if self.position == "sequence" else "grid"

    @property
    def num_positions(self) -> int:
        """Entries of a position table: along the row, or along each of the two axes."""
        if self.position == "sequence":
            return self.max_length
        return self.max_text + COMMANDS_IN_ROW + max(self.grid) + 1


class KVCache:
    """Keys and values of all layers, preallocated: each [B, H, length, d].

    `hidden` [B, length] marks slots that no other token may look at (padding left of short prompts).
    `used` counts the filled slots; the model fills the next ones.
    """

    def __init__(
        self, config: TransformerConfig, hidden: Tensor, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        rows, length = hidden.shape
        shape = (config.depth, rows, config.heads, length, config.head_width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.used = 0
        # additive: a boolean mask would be converted anew in every layer
        self._bias = torch.zeros(rows, 1, 1, length, device=device)
        self._bias.masked_fill_(hidden.to(device)[:, None, None, :], -torch.inf)

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put `k`, `v` [B, H, T, d] after the used slots; return all keys and values up to and with them."""
        end = self.used + k.shape[2]
        assert end <= self.length, f"the cache has {self.length} slots, {end} are needed"
        self.keys[layer, :, :, self.used : end] = k
        self.values[layer, :, :, self.used : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def attend(self, layer: int, q: Tensor) -> Tensor | None:
        """Attention of `q` [B, H, T, d] to what was stored, by a kernel of the cache's own; None where it has none."""
        return None

    def advance(self, new: int) -> None:
        """`new` tokens have gone through all layers."""
        self.used += new

    @property
    def length(self) -> int:
        """Slots of a row."""
        return self.keys.shape[3]

    def row(self, number: int) -> "KVCache":
        """The cache of one row alone, in the same memory; `advance` of one is not seen by the other."""
        part = copy(self)
        rows = slice(number, number + 1)
        part.keys, part.values, part._bias = self.keys[:, rows], self.values[:, rows], self._bias[rows]
        return part

    def copy_row(self, source: int, to: int) -> None:
        """Give a row the keys and values of another."""
        self.keys[:, to], self.values[:, to] = self.keys[:, source], self.values[:, source]

    def take_rows(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows: the new row i is the old row `rows[i]`."""
        self.keys, self.values, self._bias = self.keys[:, rows], self.values[:, rows], self._bias[rows]

    def hide_before(self, slot: int) -> None:
        """No later token may look at the slots before `slot`."""
        self._bias[..., : max(0, slot)] = -torch.inf

    def bias(self, new: int) -> Tensor:
        """What is added to the scores of the `new` next tokens: [B, 1, new, used + new], 0 or minus infinity."""
        end = self.used + new
        bias = self._bias[..., :end]
        if new == 1:
            return bias
        slots = torch.arange(end, device=bias.device)
        queries = slots[self.used :, None]
        bias = bias.masked_fill(slots > queries, -torch.inf)
        # padding looks at itself: a row of nothing but minus infinity would become NaN and spread through V
        return bias.masked_fill(slots == queries, 0.0)


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` whose weight follows the input's dtype: if they differ (autocast), the fused path is lost."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(x, tuple(self.normalized_shape), self.weight.to(x.dtype), self.eps)


class MaxScaledLayerNorm(nn.LayerNorm):
    """The LayerNorm of CogView's published code: the input is first divided by max|x| / 8 of the WHOLE tensor.

    LayerNorm ignores scale but for epsilon, which acts like epsilon * (max|x| / 8)^2. So a row depends on the rest of
    its batch and on later tokens; a KV cache, filled piece by piece, scales each piece by its own maximum.
    """

    def forward(self, x: Tensor) -> Tensor:
        scale = x.detach().abs().amax() / 8
        # an input of zeros would become NaN
        return super().forward(x / scale.clamp_min(torch.finfo(x.dtype).tiny))


def make_norm(config: TransformerConfig, width: int) -> nn.Module:
    if config.norm == "max_scaled_layernorm":
        return MaxScaledLayerNorm(width, eps=config.norm_eps)
    if config.norm == "layernorm":
        return nn.LayerNorm(width, eps=config.norm_eps)
    return RMSNorm(width, eps=config.norm_eps)


class Attention(nn.Module):
    """Causal multi-head self-attention: [B, T, D] to [B, T, D]."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.project = nn.Linear(config.width, config.width, bias=config.bias)
        self.q_norm = RMSNorm(config.head_width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_width, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
        bias: Tensor | None,
        pivots: Tensor | None,
        packing: Packing | None,
    ) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(x).view(rows, length, 3, self.config.heads, self.config.head_width)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each [B, H, T, d]
        # the norms may give float32 under autocast
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.store(self.layer, k, v)
        mixed = None if cache is None else cache.attend(self.layer, q)
        if mixed is not None:
            x = mixed
        elif pivots is not None:
            sizes = self.config.sparse_window, self.config.sparse_windows
            # recomputed in the backward pass: what is gathered for the blocks is many times as large as k and v
            x = checkpoint(sparse_attention, q, k, v, pivots, *sizes, self._attend, use_reentrant=False)
        elif packing is not None:
            x = packed_attention(q, k.to(q.dtype), v.to(q.dtype), packing, self._attend)
        elif bias is not None and length == 1 and x.device.type == "cpu" and not self.config.pb_relax:
            # the fused CPU kernel is made for many queries: with one it takes 3 times as long as two products
            x = single_query_attention(q, k, v, bias)
        else:
            x = self._attend(q, k.to(q.dtype), v.to(q.dtype), bias)
        return self.project(x.transpose(1, 2).reshape(rows, length, width))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Dense attention [B, H, T, d]; `bias` is added to the scores, None is causal."""
        dropout = self.config.dropout if self.training else 0.0
        if self.config.pb_relax:
            return relaxed_attention(q, k, v, bias, self.config.pb_relax, dropout)
        bias = None if bias is None else bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, bias, dropout, is_causal=bias is None)


class MLP(nn.Module):
    """Two layers with GELU (tanh approximation), or SwiGLU (Shazeer 2020, arXiv:2002.05202): [B, T, D] to [B, T, D]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        hidden = config.hidden_width
        self.expand = nn.Linear(config.width, 2 * hidden if self.gated else hidden, bias=config.bias)
        self.project = nn.Linear(hidden, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.project(F.silu(gate) * x)
        return self.project(F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    """Attention, then the MLP, each normalised before (and with `sandwich` after) and added to the stream."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.width)
        self.attention = Attention(config, layer)
        self.attention_out_norm = make_norm(config, config.width) if config.sandwich else nn.Identity()
        self.mlp_norm = make_norm(config, config.width)
        self.mlp = MLP(config)
        self.mlp_out_norm = make_norm(config, config.width) if config.sandwich else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
        bias: Tensor | None,
        pivots: Tensor | None,
        packing: Packing | None,
    ) -> Tensor:
        branch = self.attention(self.attention_norm(x), rotation, cache, bias, pivots, packing)
        x = x + self.attention_out_norm(self.dropout(branch))
        branch = self.mlp(self.mlp_norm(x))
        return x + self.mlp_out_norm(self.dropout(branch))


class Transformer(nn.Module, PyTorchModelHubMixin, library_name="mmwudao", license="apache-2.0"):
    """Tokens to the hidden states that predict the next ones."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoints_gradients = False
        vocabulary_size = config.vocabulary.padded_size
        self.embed = nn.Embedding(vocabulary_size, config.width)
        axes = {"sequence": 1, "learned_2d": 2, "rotary_2d": 0}[config.position]
        self.embed_positions = nn.ModuleList(nn.Embedding(config.num_positions, config.width) for _ in range(axes))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.norm = make_norm(config, config.width)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.width, vocabulary_size, bias=False)
        if config.position == "rotary_2d":
            # cos and sin, not frequencies: a table survives `.to(bfloat16)`, a frequency times 80 does not
            frequencies = config.rotary_base ** -torch.linspace(0, 1, config.head_width // 4 + 1)[:-1]
            angles = torch.arange(config.num_positions).unsqueeze(1) * frequencies  # [P, d/4]
            self.register_buffer("angles_cos", angles.cos(), persistent=False)
            self.register_buffer("angles_sin", angles.sin(), persistent=False)
        self._initialise()

    angles_cos: Tensor
    angles_sin: Tensor

    def _initialise(self) -> None:
        """Normal with deviation 0.02; smaller by sqrt(2 depth) where a branch ends (GPT-2's and CogView's rule)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            assert isinstance(block, Block)
            for branch in (block.attention, block.mlp):
                nn.init.normal_(branch.project.weight, std=0.02 / math.sqrt(2 * self.config.depth))

    def checkpoint_gradients(self) -> None:
        """In training, keep the inputs of the blocks alone and compute the rest again in the backward pass."""
        self.checkpoints_gradients = True

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KVCache | None = None,
        segments: Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm, of `tokens` [B, T] at `positions` [B, T] or [B, T, 2].

        With a `cache`, the tokens follow those already in it and are added to it. With `segments` [B, T], a token sees
        those before it of segment 0 and of its own alone; attention is dense then. With `lengths`, B is 1 and the row
        is rows of those lengths behind one another, none of which sees another (`rows.row.pack`); dense, too.
        """
        x = self.embed(tokens)
        rotation = None
        if self.config.position == "sequence":
            x = x + self.embed_positions[0](positions)
        elif self.config.position == "learned_2d":
            for axis, table in enumerate(self.embed_positions):
                x = x + table(positions[..., axis])
        else:
            dtype = self._compute_dtype(x)
            rotation = (
                self.angles_cos[positions].flatten(-2).unsqueeze(1).to(dtype),  # [B, T, 2, d/4] to [B, 1, T, d/2]
                self.angles_sin[positions].flatten(-2).unsqueeze(1).to(dtype),
            )
        x = self.dropout(x)
        bias = None if cache is None else cache.bias(tokens.shape[1])
        packing = None if lengths is None else self._packing(x, lengths, segments)
        if segments is not None and packing is None:
            assert cache is None
            bias = segment_bias(segments)
        # rows inside the windows see all of themselves, which is dense attention
        within = self.config.sparse_window * self.config.sparse_windows
        sparse = self.training and bias is None and packing is None and 0 < within < tokens.shape[1]
        for block in self.blocks:
            inputs = (x, rotation, cache, bias, self._draw_pivots(tokens) if sparse else None, packing)
            if self.checkpoints_gradients and self.training:
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def logits(self, hidden: Tensor, image_only: bool = False) -> Tensor:
        """Logits [..., V] of `hidden` [..., D], or [..., N] of the image codes alone. V includes the padding ids."""
        weight = self.embed.weight if self.config.tie_embeddings else self.head.weight
        return F.linear(hidden, weight[: self.config.num_image_codes] if image_only else weight)

    def loss(self, batch: RowBatch, total_weight: Tensor | float | None = None) -> dict[str, Tensor]:
        """`loss`, the weighted mean cross entropy (nats); `image_bits` and `text_bits`, plain means in bits a token.

        `total_weight` replaces the batch's own sum of weights as the divisor, so that the losses (and gradients) of
        several batches can be added up to exactly those of one large one. Bits of a kind with no tokens are NaN.
        """
        hidden = self(batch.tokens, batch.positions, segments=batch.segments, lengths=batch.lengths)
        text_mask = (batch.weights > 0) & ~batch.image_mask
        # apart, because text needs the product with the whole vocabulary and image codes, most of a row, do not
        codes_only = self.config.image_softmax == "codes"
        image, image_weights = self._cross_entropy(hidden, batch, batch.image_mask, codes_only)
        text, text_weights = self._cross_entropy(hidden, batch, text_mask, False)
        weighted = (image * image_weights).sum() + (text * text_weights).sum()
        divisor = batch.weights.sum() if total_weight is None else total_weight
        return {
            "loss": weighted / divisor,
            "image_bits": image.detach().mean() / math.log(2),
            "text_bits": text.detach().mean() / math.log(2),
        }

    def _cross_entropy(self, hidden: Tensor, batch: RowBatch, mask: Tensor, image_only: bool) -> tuple[Tensor, Tensor]:
        """Float32 cross entropy [n] at the n places of `mask` [B, T], and the weights there."""
        # places instead of the mask: each use of a mask waits for a GPU to count it
        places = mask.flatten().nonzero()[:, 0]
        logits = self.logits(hidden.flatten(0, 1).index_select(0, places), image_only=image_only)
        losses = F.cross_entropy(logits.float(), batch.targets.flatten()[places], reduction="none")
        return losses, batch.weights.flatten()[places]

    def _packing(self, x: Tensor, lengths: tuple[int, ...], segments: Tensor | None) -> Packing:
        biases = None
        if segments is not None:
            biases = [segment_bias(row) for row in segments.split(lengths, dim=1)]
        plain = not (self.config.pb_relax or (self.training and self.config.dropout))
        return make_packing(lengths, x.device, self._compute_dtype(x), biases, plain)

    def _draw_pivots(self, tokens: Tensor) -> Tensor:
        vocab = self.config.vocabulary
        return draw_pivots(tokens, vocab.num_image_codes, vocab.command("[PAD]"), self.config.sparse_pivots)

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the matrix products: autocast's where it is on."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype
