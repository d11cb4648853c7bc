"""The decoder-only transformer over text pieces and image codes: its parts, then the whole.

Shapes: B rows, T tokens, D width, H heads, d = D / H, V vocabulary (padded), N image codes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.config import to_stored
from generation.rows.row import RowBatch
from generation.transformer.attention import DenseAttention, Rotation, rotate
from generation.transformer.cache import KVCache
from generation.transformer.config import TransformerConfig
from generation.transformer.experts import Experts, balance
from generation.transformer.match_head import MatchHead
from generation.transformer.prompt_features import FeatureMap, PrefixMap
from generation.transformer.views import Inputs, View, choose_view

# Annotations stay objects here (no `from __future__ import annotations`): the hub mixin reads the type of `config`
# from the signature of `Transformer.__init__` to rebuild it from config.json.


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Within the `with` block `model` is in eval mode (no dropout, dense attention); after it, in the mode it had."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


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
    """Multi-head self-attention to what a view shows: [B, T, D] to [B, T, D]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        numbers = (config.heads + 2 * config.key_heads) * config.head_width  # of q, k and v, one after the other
        self.qkv = nn.Linear(config.width, numbers, bias=config.bias)
        self.project = nn.Linear(config.width, config.width, bias=config.bias)
        self.q_norm = RMSNorm(config.head_width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_width, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, view: View) -> Tensor:
        rows, length, _ = x.shape
        qkv = self.qkv(x).view(rows, length, -1, self.config.head_width).transpose(1, 2)
        # tensor parallel: a part of the heads
        heads = qkv.shape[1] * self.config.heads // (self.config.heads + 2 * self.config.key_heads)
        keys = (qkv.shape[1] - heads) // 2
        q, k, v = qkv.split([heads, keys, keys], dim=1)  # [B, H, T, d], and [B, K, T, d] twice
        # the norms may give float32 under autocast
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if view.rotation is not None:
            q, k = rotate(q, view.rotation), rotate(k, view.rotation)
        x = view.attend(q, k, v)
        return self.project(x.transpose(1, 2).reshape(rows, length, -1))


class MLP(nn.Module):
    """Two layers with GELU (tanh approximation), or SwiGLU (Shazeer 2020, arXiv:2002.05202): [B, T, D] to [B, T, D]."""

    def __init__(self, config: TransformerConfig, hidden: int) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.expand = nn.Linear(config.width, 2 * hidden if self.gated else hidden, bias=config.bias)
        self.project = nn.Linear(hidden, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.project(F.silu(gate) * x)
        return self.project(F.gelu(x, approximate="tanh"))


def make_mlp(config: TransformerConfig, layer: int) -> MLP | Experts:
    """The MLP of a block, or its experts."""
    options = config.experts
    if not options.at(layer):
        return MLP(config, config.hidden_width)
    hidden = options.width or config.hidden_width
    shared = MLP(config, options.shared * hidden) if options.shared else None
    gated = config.mlp == "swiglu"
    return Experts(options, config.width, hidden, gated=gated, bias=config.bias, shared=shared)


class Block(nn.Module):
    """Attention, then the MLP, each normalised before (and with `sandwich` after) and added to the stream."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.width)
        self.attention = Attention(config)
        self.attention_out_norm = make_norm(config, config.width) if config.sandwich else nn.Identity()
        self.mlp_norm = make_norm(config, config.width)
        self.mlp = make_mlp(config, layer)
        self.mlp_out_norm = make_norm(config, config.width) if config.sandwich else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, view: View) -> Tensor:
        branch = self.attention(self.attention_norm(x), view)
        x = x + self.attention_out_norm(self.dropout(branch))
        branch = self.mlp(self.mlp_norm(x))
        return x + self.mlp_out_norm(self.dropout(branch))


class CodeHead(nn.Module):
    """Hidden states [..., D] to logits [..., N] of the codes by a layer between, as Janus has one."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.width, config.width)
        self.project = nn.Linear(config.width, config.num_image_codes)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.gelu(self.expand(x)))


class Transformer(nn.Module, PyTorchModelHubMixin, library_name="mmwudao", license="apache-2.0"):
    """Tokens to the hidden states that predict the next ones."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoints_gradients = False
        vocabulary_size = config.vocabulary.padded_size
        self.embed = nn.Embedding(vocabulary_size, config.width)
        axes = {"sequence": 1, "learned_2d": 2}.get(config.position, 0)
        self.embed_positions = nn.ModuleList(nn.Embedding(config.num_positions, config.width) for _ in range(axes))
        self.dropout = nn.Dropout(config.dropout)
        self.dense = DenseAttention(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.norm = make_norm(config, config.width)
        if config.image_head == "mlp":
            self.code_head = CodeHead(config)
        elif not config.tie_embeddings:
            outputs = config.num_image_codes if config.image_head == "codes" else vocabulary_size
            self.head = nn.Linear(config.width, outputs, bias=False)
        if config.position in ("rotary_2d", "rotary_1d", "rotary_codes"):
            # cos and sin, not frequencies: a table survives `.to(bfloat16)`, a frequency times 80 does not
            angles = torch.arange(config.num_positions).unsqueeze(1) * _frequencies(config)  # [P, d/4] or [P, d/2]
            cos, sin = angles.cos(), angles.sin()
            if config.position == "rotary_codes":  # row 0 is that of text, code 0 has no angle
                cos, sin = (torch.cat([torch.zeros_like(x[:1]), x[:-1]]) for x in (cos, sin))
            self.register_buffer("angles_cos", cos, persistent=False)
            self.register_buffer("angles_sin", sin, persistent=False)
        if config.prompt_features.used:
            self.feature_map: FeatureMap | PrefixMap = FeatureMap(config.prompt_features, config.width)
        elif config.prefix_width:
            self.feature_map = PrefixMap(config.prefix_width, config.width)
        if config.match.used:
            self.match_head = MatchHead(config.match, config.width)
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
            deviation = 0.02 / math.sqrt(2 * self.config.depth)
            nn.init.normal_(block.attention.project.weight, std=deviation)
            mlp: nn.Module | None = block.mlp
            if isinstance(mlp, Experts):
                mlp.initialise(deviation)
                mlp = mlp.shared
            if isinstance(mlp, MLP):
                nn.init.normal_(mlp.project.weight, std=deviation)
        if self.config.prompt_features.used or self.config.prefix_width:
            self.feature_map.initialise()
        if self.config.match.used:
            self.match_head.initialise()

    @property
    def expert_layers(self) -> list[Experts]:
        """The layers with experts, from the first block to the last."""
        return [block.mlp for block in self.blocks if isinstance(block, Block) and isinstance(block.mlp, Experts)]

    @property
    def expert_bytes(self) -> int | None:
        """Bytes of experts in memory at most, where the others stay in a file; None where all are here."""
        found = [layer.memory.bytes for layer in self.expert_layers if layer.memory is not None]
        return found[0] if found else None

    def adjust_experts(self) -> None:
        """After a step of training: what the gates learn without gradients."""
        for layer in self.expert_layers:
            layer.adjust()

    def save_pretrained(self, save_directory: Any, **settings: Any) -> str | None:
        """As of the mixin; config.json leaves out what older models do not have (`data.config.to_stored`)."""
        settings.setdefault("config", to_stored(self._hub_mixin_config))
        return super().save_pretrained(save_directory, **settings)

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
        features: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm, of `tokens` [B, T] at `positions` [B, T] or [B, T, 2].

        With a `cache`, the tokens follow those already in it and are added to it. With `levels` or `segments` [B, T],
        the rule of `visibility` says who sees whom; with levels, a cache must be empty. With `lengths`, B is 1 and the
        row is rows of those lengths behind one another, none of which sees another (`rows.row.pack`). With any of the
        three attention is not sparse.
        `features` [..., C] are the vectors of the prompts, one for each place of `tokens` that takes one
        (`FeatureMap.mark`), in their order; without them, no row has a prompt.
        """
        x = self.embed(tokens)
        if features is not None:
            x = self.feature_map(x, tokens == self.config.vocabulary.command(self.feature_map.mark), features)
        rotation = None
        if self.config.position == "sequence":
            x = x + self.embed_positions[0](positions)
        elif self.config.position == "learned_2d":
            for axis, table in enumerate(self.embed_positions):
                x = x + table(positions[..., axis])
        else:
            rotation = self._rotation(positions, self._compute_dtype(x))
        x = self.dropout(x)
        dtype = self._compute_dtype(x)
        view = choose_view(Inputs(tokens, dtype, rotation, cache, segments, lengths, levels), self.dense)
        for layer, block in enumerate(self.blocks):
            if self.checkpoints_gradients and self.training:
                x = checkpoint(block, x, view.at(layer), use_reentrant=False)
            else:
                x = block(x, view.at(layer))
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def logits(self, hidden: Tensor, image_only: bool = False) -> Tensor:
        """Logits [..., V] of `hidden` [..., D], or [..., N] of the image codes alone. V includes the padding ids."""
        assert image_only or self.config.image_head == "linear", "this model has no logits of text"
        if self.config.image_head == "mlp":
            return self.code_head(hidden)
        weight = self.embed.weight if self.config.tie_embeddings else self.head.weight
        return F.linear(hidden, weight[: self.config.num_image_codes] if image_only else weight)

    def loss(self, batch: RowBatch, total_weight: Tensor | float | None = None) -> dict[str, Tensor]:
        """`loss`, the weighted mean cross entropy (nats); `image_bits` and `text_bits`, plain means in bits a token.

        `total_weight` replaces the batch's own sum of weights as the divisor, so that the losses (and gradients) of
        several batches can be added up to exactly those of one large one. Bits of a kind with no tokens are NaN.
        In training, `loss` of a model with experts has the loss that evens their load in it, and the figures of
        `experts.balance` are there.
        """
        hidden = self(
            batch.tokens,
            batch.positions,
            segments=batch.segments,
            lengths=batch.lengths,
            features=batch.features,
            levels=batch.levels,
        )
        text_mask = (batch.weights > 0) & ~batch.image_mask
        # apart, because text needs the product with the whole vocabulary and image codes, most of a row, do not
        codes_only = self.config.image_softmax == "codes"
        image, image_weights = self._cross_entropy(hidden, batch, batch.image_mask, codes_only)
        text, text_weights = self._cross_entropy(hidden, batch, text_mask, False)
        weighted = (image * image_weights).sum() + (text * text_weights).sum()
        divisor = batch.weights.sum() if total_weight is None else total_weight
        losses = {
            "loss": weighted / divisor,
            "image_bits": image.detach().mean() / math.log(2),
            "text_bits": text.detach().mean() / math.log(2),
        }
        return self.with_balance(losses)

    def with_balance(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of a pass with what `loss` adds in training to those of a model with experts."""
        if not (self.training and self.config.experts.used):
            return losses
        figures = balance(self.expert_layers)
        return losses | {"loss": losses["loss"] + figures.pop("balance_loss")} | figures

    def match(self, batch: RowBatch) -> tuple[Tensor, Tensor]:
        """The vectors of the pictures [N, C] and of the texts [M, C] of rows that are matched, float32, of length 1.

        The first text of every picture comes first, then the second of every one, and so on.
        """
        assert batch.labels is not None, "rows of the kind match"
        hidden = self(batch.tokens, batch.positions, segments=batch.segments, lengths=batch.lengths)
        found = self.vectors(hidden, batch.tokens).unflatten(0, (len(batch.labels), -1))
        return found[:, 0], found[:, 1:].transpose(0, 1).flatten(0, 1)

    def vectors(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The vectors [F, C] at the F places of [ENC] in `tokens` [B, T], from their hidden states [B, T, D]."""
        places = (tokens == self.config.vocabulary.command("[ENC]")).flatten().nonzero()[:, 0]
        return self.match_head(hidden.flatten(0, 1).index_select(0, places))

    def _cross_entropy(self, hidden: Tensor, batch: RowBatch, mask: Tensor, image_only: bool) -> tuple[Tensor, Tensor]:
        """Float32 cross entropy [n] at the n places of `mask` [B, T], and the weights there."""
        # places instead of the mask: each use of a mask waits for a GPU to count it
        places = mask.flatten().nonzero()[:, 0]
        logits = self.logits(hidden.flatten(0, 1).index_select(0, places), image_only=image_only)
        losses = F.cross_entropy(logits.float(), batch.targets.flatten()[places], reduction="none")
        return losses, batch.weights.flatten()[places]

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """cos and sin [B, 1, T, d/2] of the angles at `positions` [B, T, 2] or [B, T]."""
        rows, length = positions.shape[:2]
        return (
            self.angles_cos[positions].view(rows, 1, length, -1).to(dtype),  # of [B, T, 2, d/4] or [B, T, d/2]
            self.angles_sin[positions].view(rows, 1, length, -1).to(dtype),
        )

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the matrix products: autocast's where it is on."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype


def _frequencies(config: TransformerConfig) -> Tensor:
    """How far each pair turns from one position to the next, in radians: [d/4] for each axis, or [d/2] for the one."""
    if config.position in ("rotary_1d", "rotary_codes"):
        # in the order of operations of other projects: a last bit off is a different angle at position 600
        turned = config.head_width // (1 if config.position == "rotary_1d" else 2)
        exponents = torch.arange(0, turned, 2, dtype=torch.float32) / turned
        return 1.0 / config.rotary_base**exponents
    return config.rotary_base ** -torch.linspace(0, 1, config.head_width // 4 + 1)[:-1]
