"""Towers that start from networks trained elsewhere: a text encoder, an ImageNet trunk, and two small heads.

Locked-image tuning (Zhai et al. 2022, arXiv:2111.07991) with both sides locked at first, as the trunks allow. What the
ImageNet trunk can name also speaks for itself: the text vectors of its classes, weighted by their probabilities, are
added to the picture's vector, as in ConSE (Norouzi et al. 2014, arXiv:1312.5650).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.config import ConfigError, from_dict, to_dict
from data.options import check_options, option
from retrieval.encoders.text_encoder import TOKENIZER, TextEncoder, TextEncoderConfig
from retrieval.towers.base import Tokens, Towers, token_counts, unit
from vqvae.storage.blocks import packed_tensors, unpacked_tensors
from vqvae.storage.parts import ModelError, without_weights
from vqvae.trunk import Trunk, TrunkConfig

# with a text encoder of 4 bits, this is stored in 4 bits as well, and all the rest in 8
PACKED_PARTS = ("text_encoder.", "trunk.model.classifier.")
VECTORS = "vectors"  # the key of tokens that stand for vectors of the text encoder, computed before


@dataclass
class HeadsConfig:
    """What is trained between the two encoders and the common space."""

    embed_dim: int = option(256, "Numbers of a vector in the common space.", least=1, most=8192)
    image_size: int = option(128, "Pixels a side of the squares that the trunk sees.", least=8, most=2048)
    hidden: int = option(512, "Width of the hidden layer of each head, beside its linear map.", least=1, most=16384)
    warm_steps: int = option(
        600, "Steps that train the heads alone on the trunk's features, before the trunk is trained.", least=0
    )
    dropout: float = option(0.2, "Dropout before the heads, in training.", least=0, below=1)
    class_weight: float = option(
        1.0, "Length of the text vector of a class that the trunk is sure of, beside the picture's own of 1.", least=0
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class PretrainedConfig:
    """The two encoders and the heads, as `config.json` holds them."""

    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)


class FeatureHead(nn.Module):
    """Features [N, inward], standardised by fixed numbers -> [N, outward]: a linear map beside one hidden layer."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, inward: int, config: HeadsConfig) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inward))
        self.register_buffer("deviation", torch.ones(inward))
        self.dropout = nn.Dropout(config.dropout)
        self.linear = nn.Linear(inward, config.embed_dim)
        self.hidden = nn.Sequential(
            nn.Linear(inward, config.hidden), nn.GELU(), nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.embed_dim),
        )  # fmt: skip

    @torch.no_grad()
    def standardise_by(self, features: Tensor) -> None:
        """Take mean and deviation of features [N, inward]; E5's vectors of short texts all lie in one narrow cone."""
        self.mean.copy_(features.float().mean(dim=0))
        self.deviation.copy_(features.float().std(dim=0).clamp(min=1e-4))

    def forward(self, features: Tensor) -> Tensor:
        """[N, inward] -> [N, outward], not normalised."""
        standard = self.dropout((features.float() - self.mean.float()) / self.deviation.float()).to(self.linear.weight)
        return self.linear(standard) + self.hidden(standard)


class PretrainedTowers(Towers):
    """A trunk and a text encoder that were trained elsewhere, and a head on each."""

    kind: ClassVar[str] = "pretrained"
    class_vectors: Tensor

    def __init__(self, config: PretrainedConfig, tokenizer: bytes) -> None:
        """`tokenizer` is the content of the text encoder's tokenizer.json. Raises `ConfigError` or `ModelError`."""
        super().__init__()
        self.config = config
        heads = config.heads
        self.embed_dim, self.image_size = heads.embed_dim, heads.image_size
        self.pixel_mean = tuple(config.trunk.pixel_mean)  # type: ignore[assignment]  # three, which is checked
        self.pixel_std = tuple(config.trunk.pixel_std)  # type: ignore[assignment]
        self.text_encoder = TextEncoder(config.text, tokenizer)
        self.trunk = Trunk(config.trunk)
        self.trunk.to(memory_format=torch.channels_last)
        self.text_head = FeatureHead(self.text_encoder.width, heads)
        self.image_head = FeatureHead(self.trunk.channels, heads)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # Radford et al. 2021, section 2.5
        # the text head's vectors of the trunk's classes; zeros: classes without names
        self.register_buffer("class_vectors", torch.zeros(config.trunk.num_classes, heads.embed_dim))

    @property
    def scale(self) -> Tensor:
        return self.logit_scale.float().exp().clamp(max=100)  # as CLIP does

    @classmethod
    def from_parts(cls, text: TextEncoder, trunk: Trunk, heads: HeadsConfig) -> Self:
        """New towers on trained encoders; the heads start at random."""
        towers = cls(PretrainedConfig(text.config, trunk.config, heads), text.serialised)
        towers.text_encoder.load_state_dict(text.state_dict())
        towers.trunk.load_state_dict(trunk.state_dict())
        return towers

    def with_text_encoder(self, text: TextEncoder) -> PretrainedTowers:
        """A copy that reads texts by `text`, a student that learned the vectors of this text encoder.

        Raises `ConfigError` for an encoder of another width.
        """
        if text.width != self.text_encoder.width:
            raise ConfigError(f"a text encoder of width {text.width} cannot stand for one of {self.text_encoder.width}")
        towers = PretrainedTowers.from_parts(text, self.trunk, self.config.heads)
        for name in ("text_head", "image_head"):
            getattr(towers, name).load_state_dict(getattr(self, name).state_dict())
        with torch.no_grad():
            towers.logit_scale.copy_(self.logit_scale)
            towers.class_vectors.copy_(self.class_vectors)
        return towers.eval()

    @classmethod
    def from_config(cls, record: dict[str, Any], folder: Path) -> Self:
        if not (folder / TOKENIZER).is_file():
            raise ModelError(f"{folder} is incomplete: {TOKENIZER} is missing")
        try:
            with without_weights():
                return cls(from_dict(PretrainedConfig, record), (folder / TOKENIZER).read_bytes())
        except ConfigError as error:
            raise ModelError(f"{folder}: {error}") from error

    def to_config(self) -> dict[str, Any]:
        return to_dict(self.config)

    def text_files(self) -> dict[str, bytes]:
        return {TOKENIZER: self.text_encoder.serialised}

    def stored_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """As in `Towers`; small throughout if the text encoder is (`PACKED_PARTS` says in how many bits)."""
        stored = super().stored_tensors(dtype)
        if self.config.text.bits != 4:
            return stored
        text = {name: tensor for name, tensor in stored.items() if name.startswith(PACKED_PARTS)}
        rest = {name: tensor for name, tensor in stored.items() if name not in text}
        return {**packed_tensors(rest, 8), **packed_tensors(text, 4)}

    def restored_tensors(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = unpacked_tensors(stored, {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()})
        # stored tensors lack the layout of the trunk's convolutions
        return {
            name: tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
            for name, tensor in tensors.items()
        }

    def tokenize(self, texts: list[str]) -> Tensor:
        """Ids, int64 [N, L], padded."""
        return self.text_encoder.tokenize(texts)

    def count_tokens(self, tokens: Tokens) -> list[int]:
        assert isinstance(tokens, Tensor), "what `tokenize` made"
        return token_counts(tokens, self.config.text.pad_token)

    def checkpoint_gradients(self) -> None:
        try:
            self.trunk.model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:  # timm's way to say that a network cannot
            raise ConfigError(f"{self.config.trunk.architecture} cannot train with checkpoint_gradients") from error
        self.text_encoder.transformer.checkpoint_gradients()

    def encode_map(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The trunk's last map [N, C, h, w] -> unit vectors [N, embed_dim], and the class logits [N, classes]."""
        logits = self.trunk.classify(features).float() if self.config.trunk.num_classes else features.new_zeros(1, 0)
        return self.combine(features.mean(dim=(2, 3)), logits), logits

    def combine(self, pooled: Tensor, logits: Tensor) -> Tensor:
        """Pooled features [N, C] and class logits [N, classes] -> unit vectors [N, embed_dim]."""
        own = unit(self.image_head(pooled))
        if not self.config.trunk.num_classes:
            return own
        named = logits.softmax(dim=1) @ self.class_vectors.float()  # short where the trunk is unsure
        return unit(own + self.config.heads.class_weight * named)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        vectors, _ = self.encode_map(self.trunk.forward_map(pixels.contiguous(memory_format=torch.channels_last)))
        return vectors

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        """As in `Towers`; tokens may also be {`VECTORS`: [N, width]}, what the text encoder made of texts before."""
        vectors = tokens[VECTORS] if isinstance(tokens, dict) else F.normalize(self.text_encoder(tokens).float(), dim=1)
        return unit(self.text_head(vectors))

    @torch.no_grad()
    def name_classes(self, vectors: Tensor) -> None:
        """Set `class_vectors` from the text encoder's vectors [classes, width] of the classes' names."""
        training = self.text_head.training
        self.class_vectors.copy_(unit(self.text_head.eval()(vectors.to(self.device))))
        self.text_head.train(training)
