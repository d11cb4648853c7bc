"""BERT (Devlin et al. 2018, arXiv:1810.04805) and RoBERTa's kin, by the names of their tensors in transformers.

transformers has both and is what they are tested against, to the bit. It is not what they are made of: importing its
models takes seconds, more than half of what drawing a picture takes, and they are needed for every prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.options import DEPTH, WIDTH, check_options, option

MODEL_TYPES = ("bert", "roberta", "xlm-roberta")
SHORT = 64  # tokens
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}  # the approximation of GELU


@dataclass
class BertConfig:
    """The sizes, by transformers' names and with its defaults. Raises `ValueError` for what this cannot be."""

    model_type: str = "bert"
    vocab_size: int = option(30522, "Rows of the pieces.", least=1, most=2**24)
    hidden_size: int = option(768, "Width.", least=1, most=WIDTH)
    num_hidden_layers: int = option(12, "Layers.", least=0, most=DEPTH)
    num_attention_heads: int = option(12, "Heads of a layer.", least=1, most=WIDTH)
    intermediate_size: int = option(3072, "Width inside the MLP of a layer.", least=1, most=8 * WIDTH)
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = option(0.1, "Dropout of hidden vectors.", least=0, most=1)
    attention_probs_dropout_prob: float = option(0.1, "Dropout of attention.", least=0, most=1)
    max_position_embeddings: int = option(512, "Rows of the positions.", least=1, most=2**20)
    type_vocab_size: int = option(2, "Rows of the kinds of text, of which the first is used.", least=1, most=2**16)
    initializer_range: float = option(0.02, "Standard deviation of weights at the start.", least=0, most=100)
    layer_norm_eps: float = option(1e-12, "Added to variances.", least=0, most=1)
    pad_token_id: int = option(0, "The piece that pads.", least=0, most=2**24)
    position_embedding_type: str = "absolute"

    def __post_init__(self) -> None:
        check_options(self)
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type is one of {', '.join(MODEL_TYPES)}, not {self.model_type!r}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is one of {', '.join(ACTIVATIONS)}, not {self.hidden_act!r}")
        if self.position_embedding_type != "absolute":
            raise ValueError(f"position_embedding_type is absolute, not {self.position_embedding_type!r}")
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id} is none of {self.vocab_size} pieces")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )

    @property
    def first_position(self) -> int:
        """The row of the first token's place: RoBERTa counts from behind the padding's id."""
        return 0 if self.model_type == "bert" else self.pad_token_id + 1


class Bert(nn.Module):
    """Token ids -> the last layer's vectors. Weights start at random."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = _Layers(config)
        self.apply(self._start)

    def forward(self, ids: Tensor, present: Tensor) -> Tensor:
        """Ids [N, L], and which of them are no padding, bool [N, L] -> [N, L, width]."""
        hidden: Tensor = self.encoder(self.embeddings(ids), self._attended(present))
        return hidden

    def checkpoint_gradients(self) -> None:
        """Compute each layer again in the backward pass instead of keeping what it computed."""
        self.encoder.checkpointing = True

    @staticmethod
    def _attended(present: Tensor) -> Tensor | None:
        """What each token looks at, bool [N, 1, L, L]; None for all, which has a faster kernel."""
        # an exported graph cannot depend on what its input holds
        if not torch.compiler.is_exporting() and bool(present.all()):
            return None
        count, length = present.shape
        return present[:, None, None, :].expand(count, 1, length, length)

    def _start(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])


class _Embeddings(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, pad = config.hidden_size, config.pad_token_id
        self.first, self.pad = config.first_position, pad
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=pad)
        unused = pad if self.first else None
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width, padding_idx=unused)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor) -> Tensor:
        if self.first:
            present = (ids != self.pad).long()
            places = present.cumsum(dim=1) * present + self.pad
        else:
            places = torch.arange(ids.shape[1], device=ids.device)[None]
        # one text: the first of the types, which are for pairs
        mixed = self.word_embeddings(ids) + self.token_type_embeddings(torch.zeros_like(ids))
        placed: Tensor = self.dropout(self.LayerNorm(mixed + self.position_embeddings(places)))
        return placed


class _Layers(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.checkpointing = False

    def forward(self, hidden: Tensor, attended: Tensor | None) -> Tensor:
        for layer in self.layer:
            if self.checkpointing and self.training:
                from torch.utils.checkpoint import checkpoint

                hidden = checkpoint(layer, hidden, attended, use_reentrant=False)
            else:
                hidden = layer(hidden, attended)
        return hidden


class _Layer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = _Output(config.intermediate_size, config)
        self.approximation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor, attended: Tensor | None) -> Tensor:
        hidden = self.attention(hidden, attended)
        inner = F.gelu(self.intermediate["dense"](hidden), approximate=self.approximation)
        return self.output(inner, hidden)


class _Attention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.self = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.output = _Output(width, config)
        self.heads = config.num_attention_heads
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)  # a module: others turn it off as one

    def forward(self, hidden: Tensor, attended: Tensor | None) -> Tensor:
        parts = (self.self[name](hidden) for name in ("query", "key", "value"))
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        dropped = self.dropout.p if self.training else 0.0
        if torch.is_grad_enabled() and query.device.type == "cpu" and query.shape[2] <= SHORT:
            mixed = attend_short(query, key, value, attended, dropped)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attended, dropout_p=dropped)
        return self.output(mixed.transpose(1, 2).flatten(2), hidden)


def attend_short(query: Tensor, key: Tensor, value: Tensor, attended: Tensor | None, dropped: float) -> Tensor:
    """`F.scaled_dot_product_attention` spelt out: for rows of tens of tokens PyTorch's own is slow backwards on a CPU.

    Query, key and value [N, heads, L, d], `attended` bool [N, 1, L, L] -> [N, heads, L, d].
    """
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if attended is not None:
        scores = scores.masked_fill(~attended, -torch.inf)
    return F.dropout(scores.softmax(dim=-1), dropped) @ value


class _Output(nn.Module):
    """A linear map, then the norm of what it gives and of what went into the block."""

    def __init__(self, inward: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(inward, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, inner: Tensor, before: Tensor) -> Tensor:
        mixed: Tensor = self.LayerNorm(self.dropout(self.dense(inner)) + before)
        return mixed


def bert_of(architecture: dict[str, Any]) -> Bert:
    """The network of a configuration in transformers' words. Raises `ValueError` or `TypeError` for another one."""
    unknown = sorted(set(architecture) - set(BertConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no setting of a text encoder")
    return Bert(BertConfig(**architecture))
