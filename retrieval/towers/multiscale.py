"""Our own towers: a CNN with multi-scale patch pooling, and a small transformer over SentencePiece pieces.

The image tower follows BriVL 2.0 (Fei et al. 2022, Nature Communications 13:3094, "multi-scale patch pooling"), or
BriVL 1.0 (Huo et al. 2021, arXiv:2103.06561, section 3.2) with regions. Both are trained from scratch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import timm
import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig

from data.config import ConfigError, from_dict, to_dict
from data.options import DEPTH, SIDE, WIDTH, check_options, option
from data.text import TextTokenizer
from retrieval.towers.base import TEXT_MODEL, Tokens, Towers, unit
from vqvae.storage.parts import ModelError

logger = logging.getLogger(__name__)


@dataclass
class MultiScaleConfig:
    """The parts and their sizes. Training sets `num_text_pieces` and `text_hash` from the text tokenizer."""

    embed_dim: int = option(256, "The width of the shared space.", least=1, most=WIDTH)
    image_size: int = option(
        64, "The side of the square to which pictures are resized and cropped, in pixels.", least=1, most=SIDE
    )
    trunk: str = "resnet10t"  # a timm architecture with a feature map; its weights start at random
    trunk_options: dict[str, Any] = field(default_factory=dict)  # for timm.create_model
    # patches: cells of the feature map, on `grids`; regions: the given boxes, or by default the cells of `grids`
    image_head: Literal["patches", "regions"] = "patches"
    grids: list[int] = option([1, 2, 4], "Patches a side, one number for each grid.", least=1, most=1024)
    head_width: int = option(256, "The width of the heads.", least=1, most=WIDTH)
    head_heads: int = option(4, "Attention heads of the heads.", least=1, most=DEPTH)
    # a configuration of transformers: `model_type` and the values that differ from its defaults
    text_encoder: dict[str, Any] = field(default_factory=lambda: {"model_type": "bert"})
    max_text: int = option(32, "Tokens of a text at most, the start token included.", least=2, most=2**16)
    num_text_pieces: int = option(0, "Pieces of text; training sets it.", least=0, most=2**22)
    text_hash: str = ""

    def __post_init__(self) -> None:
        check_options(self)
        if not self.grids:
            raise ValueError("grids must hold at least one number of patches a side, each 1 or more")
        if self.head_width % self.head_heads:
            raise ValueError(f"head_width={self.head_width} is not a multiple of head_heads={self.head_heads}")


class PatchHead(nn.Module):
    """Feature map -> one vector: means over the cells of several grids, then `SetHead` over all of them."""

    def __init__(self, channels: int, map_size: tuple[int, int], config: MultiScaleConfig) -> None:
        super().__init__()
        self.head = SetHead(channels, config)
        cells = torch.eye(map_size[0] * map_size[1]).unflatten(0, map_size).movedim(-1, 0)[:, None]
        pooling = [F.adaptive_avg_pool2d(cells, grid).flatten(1) for grid in config.grids]
        self.register_buffer("pooling", torch.cat(pooling, dim=1), persistent=False)  # [H x W, patches]

    def forward(self, features: Tensor, boxes: list[Tensor] | None = None) -> Tensor:
        """[N, C, H, W] -> [N, embed_dim]."""
        if boxes is not None:
            raise ValueError("these towers take no boxes: their image_head is patches, not regions")
        patches = features.flatten(2) @ self.get_buffer("pooling").to(features.dtype)  # [N, C, patches]
        return self.head(patches.transpose(1, 2))


class RegionHead(nn.Module):
    """Feature map and boxes -> one vector: RoIAlign of the boxes and the whole picture, then `SetHead` over them.

    RoIAlign samples where BriVL 1.0's grid pooling was meant to; the imported BriVL keeps the original's grid.
    """

    def __init__(self, channels: int, map_size: tuple[int, int], config: MultiScaleConfig) -> None:
        super().__init__()
        self.head = SetHead(channels, config)
        self.image_size, self.grids = config.image_size, config.grids

    def forward(self, features: Tensor, boxes: list[Tensor] | None = None) -> Tensor:
        """[N, C, H, W] -> [N, embed_dim]; `boxes` are [n, 4] for each picture: x1, y1, x2, y2 in input pixels."""
        from torchvision.ops import roi_align

        if boxes is None:
            boxes = [grid_boxes(self.image_size, self.grids)] * len(features)
        elif len(boxes) != len(features):
            raise ValueError(f"there are {len(boxes)} lists of boxes for {len(features)} pictures")
        whole = torch.tensor([[0.0, 0.0, self.image_size, self.image_size]])
        # regions are a set: the whole picture is one of them, as in BriVL
        precise = features.float()  # RoIAlign lacks bfloat16 on the CPU
        padded = [torch.cat([whole.to(precise), b.to(precise).reshape(-1, 4)]) for b in boxes]
        counts = torch.tensor([len(b) for b in padded], device=features.device)
        pooled = roi_align(
            precise, padded, output_size=2, spatial_scale=features.shape[-1] / self.image_size, aligned=True
        ).mean(dim=(2, 3))
        vectors = pooled.to(features.dtype).split(counts.tolist())
        regions = nn.utils.rnn.pad_sequence(list(vectors), batch_first=True)
        return self.head(regions, torch.arange(regions.shape[1], device=counts.device) >= counts[:, None])


class SetHead(nn.Module):
    """A set of vectors -> one vector: self-attention without positions, the mean, and a projection."""

    def __init__(self, channels: int, config: MultiScaleConfig) -> None:
        super().__init__()
        width = config.head_width
        self.inward = nn.Linear(channels, width)
        self.attention = nn.TransformerEncoderLayer(
            width, config.head_heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)
        self.outward = nn.Linear(width, config.embed_dim)

    def forward(self, vectors: Tensor, padding: Tensor | None = None) -> Tensor:
        """[N, P, C] -> [N, embed_dim]; `padding` [N, P] is true for missing vectors."""
        mixed = self.norm(self.attention(self.inward(vectors), src_key_padding_mask=padding))
        if padding is None:
            return self.outward(mixed.mean(dim=1))
        kept = (~padding)[..., None]
        return self.outward((mixed * kept).sum(dim=1) / kept.sum(dim=1))


def grid_boxes(image_size: int, grids: list[int]) -> Tensor:
    """The cells of the grids as boxes x1, y1, x2, y2 in pixels, float32 [P, 4]."""
    boxes = []
    for grid in grids:
        edges = torch.linspace(0, image_size, grid + 1)
        boxes += [[edges[x], edges[y], edges[x + 1], edges[y + 1]] for y in range(grid) for x in range(grid)]
    return torch.tensor(boxes)


class MultiScaleTowers(Towers):
    """The towers of the shipped model, built from a config and a text tokenizer. On disk their kind is "ours"."""

    kind: ClassVar[str] = "ours"
    trunk: Any  # of timm, which has no types

    def __init__(self, config: MultiScaleConfig, text: TextTokenizer) -> None:
        """Raises `ConfigError` for a trunk or a text encoder that the libraries cannot build."""
        super().__init__()
        if (config.num_text_pieces, config.text_hash) != (text.vocab_size, text.content_hash):
            raise ConfigError("the towers belong to another text tokenizer")
        self.config, self.text_tokenizer = config, text
        self.embed_dim, self.image_size = config.embed_dim, config.image_size
        self.start_id = text.vocab_size  # with it, the mean over tokens is defined for an empty text
        try:
            self.trunk = timm.create_model(
                config.trunk, pretrained=False, num_classes=0, global_pool="", **config.trunk_options
            )
            encoder = AutoConfig.for_model(
                **{"pad_token_id": 0, **config.text_encoder},
                vocab_size=text.vocab_size + 1,
                max_position_embeddings=config.max_text,
            )
            self.text_encoder = HFTextEncoder(
                "", config.embed_dim, encoder, pooler_type="mean_pooler", proj_type="linear"
            )
            with torch.no_grad():
                shape = self.trunk.eval()(torch.zeros(1, 3, config.image_size, config.image_size)).shape
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"these towers cannot be built: {' '.join(str(error).split())[:300]}") from error
        if len(shape) != 4:
            raise ConfigError(f"the trunk {config.trunk} must return a feature map [N, C, H, W], not {list(shape)}")
        self.text_encoder.transformer.pooler = None  # the mean over tokens replaces it
        head = {"patches": PatchHead, "regions": RegionHead}[config.image_head]
        self.image_head = head(shape[1], (shape[2], shape[3]), config)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # Radford et al. 2021, section 2.5
        self.trunk.to(memory_format=torch.channels_last)

    @property
    def scale(self) -> Tensor:
        return self.logit_scale.float().exp().clamp(max=100)  # as CLIP does

    @classmethod
    def from_config(cls, record: dict[str, Any], folder: Path) -> Self:
        # the towers of a model directory share the text model that lies beside their folder; the hash is checked
        own = folder / TEXT_MODEL
        text_model = own if own.is_file() else folder.absolute().parent / TEXT_MODEL
        try:
            return cls(from_dict(MultiScaleConfig, record), TextTokenizer(text_model if text_model.is_file() else own))
        except ConfigError as error:
            raise ModelError(f"{folder}: {error}") from error

    def to_config(self) -> dict[str, Any]:
        return to_dict(self.config)

    def text_files(self) -> dict[str, bytes]:
        return {TEXT_MODEL: self.text_tokenizer.serialised}

    def tokenize(self, texts: list[str]) -> Tensor:
        """Ids, int64 [N, L]: the start token, the pieces, 0 as padding; L is the longest length, at most `max_text`."""
        rows = []
        for text in texts:
            row = [self.start_id, *self.text_tokenizer.encode(text)]
            if len(row) > self.config.max_text:
                logger.warning("a text of %d tokens is cut to %d: %.40r", len(row), self.config.max_text, text)
            rows.append(torch.tensor(row[: self.config.max_text]))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def encode_pixels(self, pixels: Tensor, boxes: list[Tensor] | None = None) -> Tensor:
        """As in `Towers`; `boxes` (image_head: regions): [n, 4] for each picture, x1, y1, x2, y2 in input pixels."""
        features = self.trunk(pixels.contiguous(memory_format=torch.channels_last))
        return unit(self.image_head(features, boxes))

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        return unit(self.text_encoder(tokens))

    def checkpoint_gradients(self) -> None:
        self.trunk.set_grad_checkpointing(True)
        self.text_encoder.set_grad_checkpointing(True)
