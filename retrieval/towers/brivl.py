"""BriVL 1.0 (Huo et al. 2021, arXiv:2103.06561): EfficientNet and boxes, Chinese RoBERTa, as published.

N pictures or texts, B box slots, L tokens, W width of a tower, D width of the common space (that of the image tower),
S pixels a side. docs/retrieval-imports.md lists the quirks that the published weights were trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from data.config import from_dict, to_dict
from data.images import to_tensor
from data.options import DEPTH, SIDE, WIDTH, check_options, option
from retrieval.towers.base import Tokens, Towers, unit
from retrieval.towers.foreign import check_trunk
from retrieval.towers.word_pieces import WordPieces
from vqvae.storage.parts import ModelError

Box = Sequence[float]  # x1, y1, x2, y2 in pixels of the original picture


@dataclass(frozen=True)
class BertSizes:
    """The text backbone; the default is hfl/chinese-roberta-wwm-ext."""

    hidden_size: int = option(768, "The width.", least=1, most=WIDTH)
    num_hidden_layers: int = option(12, "Layers.", least=1, most=DEPTH)
    num_attention_heads: int = option(12, "Heads of a layer.", least=1, most=DEPTH)
    intermediate_size: int = option(3072, "The width inside the MLP.", least=1, most=8 * WIDTH)
    max_position_embeddings: int = option(512, "Positions.", least=3, most=2**20)
    type_vocab_size: int = option(2, "Kinds of tokens.", least=1, most=1024)
    vocab_size: int = option(21128, "Pieces of text.", least=5, most=2**22)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class BrivlConfig:
    """Sizes, by default those of the published cfg/test_xyb.yml. `cnn` and `cnn_options` go to `timm.create_model`."""

    cnn: str = "tf_efficientnet_b5"
    cnn_options: dict[str, Any] = field(default_factory=dict)
    image_size: int = option(380, "The side of the square input in pixels.", least=32, most=SIDE)
    image_width: int = option(2048, "The width of the image tower.", least=1, most=WIDTH)
    image_heads: int = option(4, "Heads of a layer of the image tower.", least=1, most=DEPTH)
    image_layers: int = option(4, "Layers of the image tower.", least=1, most=DEPTH)
    box_slots: int = option(37, "Boxes of a picture, the one of the whole picture included.", least=1, most=2**16)
    grid_size: int = option(4, "Samples along each side of a box.", least=1, most=1024)
    bert: BertSizes = field(default_factory=BertSizes)
    text_heads: int = option(4, "Heads of a layer of the text head.", least=1, most=DEPTH)
    text_layers: int = option(4, "Layers of the text head.", least=1, most=DEPTH)
    text_tokens: int = option(80, "Tokens that all texts are padded to, start and end included.", least=3, most=2**20)
    temperature: float = option(0.07, "The temperature of the loss.", least=0.0001, most=100)

    def __post_init__(self) -> None:
        check_options(self)
        check_trunk(self.cnn, self.cnn_options)
        if self.text_tokens > self.bert.max_position_embeddings:
            raise ValueError(f"text_tokens={self.text_tokens} is above BERT's {self.bert.max_position_embeddings}")


class Head(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, out)
        self.fc2 = nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.fc2(F.relu(self.fc1(x)))
        return hidden


class MaskedPool(nn.Module):
    """Unit vectors -> a post-norm transformer without positions -> the mean over the slots with mask 1."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, batch_first=True)  # feed-forward width 2048 at any width
        # nested tensors would drop slots that no row uses
        self.attention = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[N, B, W], [N, B] of 0 and 1 -> [N, W]."""
        x = self.attention(F.normalize(x, dim=-1), src_key_padding_mask=mask == 0)
        weights = (mask == 1).to(x).unsqueeze(-1)
        return (x * weights).sum(1) / weights.sum(1)


class BrivlImageTower(nn.Module):
    """Encodes a picture with its boxes as a vector."""

    def __init__(self, config: BrivlConfig) -> None:
        super().__init__()
        self.image_size, self.grid_size = config.image_size, config.grid_size
        self.backbone: Any = timm.create_model(config.cnn, pretrained=False, num_classes=0, **config.cnn_options)
        if self.backbone.num_features != config.image_width:
            raise ValueError(f"{config.cnn} gives {self.backbone.num_features} features, not {config.image_width}")
        self.project = nn.Conv2d(config.image_width, config.image_width, 1)
        self.pool = MaskedPool(config.image_width, config.image_heads, config.image_layers)
        self.head = Head(config.image_width, config.image_width)

    def forward(self, pixels: Tensor, boxes: Tensor, mask: Tensor) -> Tensor:
        """[N, 3, S, S], corners in pixels of the square [N, B, 4], [N, B] -> [N, D]."""
        features = pool_boxes(self.backbone.forward_features(pixels), boxes, self.image_size, self.grid_size)
        projected = self.project(features.unsqueeze(-1)).squeeze(-1)
        vector: Tensor = self.head(self.pool(projected.transpose(1, 2), mask))
        return vector


class BrivlTextTower(nn.Module):
    """Encodes tokens as a vector. As in the original, BERT gets no attention mask and attends to the padding."""

    def __init__(self, config: BrivlConfig) -> None:
        super().__init__()
        self.backbone = BertModel(BertConfig(**to_dict(config.bert)), add_pooling_layer=False)
        self.pool = MaskedPool(config.bert.hidden_size, config.text_heads, config.text_layers)
        self.head = Head(config.bert.hidden_size, config.image_width)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids and mask [N, L] -> [N, D]."""
        hidden = self.backbone(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        vector: Tensor = self.head(self.pool(hidden, mask))
        return vector


class BrivlTowers(Towers):
    """BriVL behind our interface. Without boxes, the whole picture is the only box."""

    kind = "brivl"
    pixel_mean = (0.485, 0.456, 0.406)
    pixel_std = (0.229, 0.224, 0.225)

    def __init__(self, config: BrivlConfig, vocab: bytes) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = config.image_width
        self.image_size = config.image_size
        self.image = BrivlImageTower(config)
        self.text = BrivlTextTower(config)
        self._vocab = vocab
        self._pieces = WordPieces(vocab, google=False)
        if self._pieces.size > config.bert.vocab_size:
            raise ModelError(f"vocab.txt has {self._pieces.size} pieces, and the towers only {config.bert.vocab_size}")

    @property
    def scale(self) -> Tensor:
        return torch.tensor(1 / self.config.temperature, device=self.device)

    @classmethod
    def from_config(cls, record: dict[str, Any], folder: Path) -> BrivlTowers:
        return cls(from_dict(BrivlConfig, record), (folder / "vocab.txt").read_bytes())

    def to_config(self) -> dict[str, Any]:
        return to_dict(self.config)

    def text_files(self) -> dict[str, bytes]:
        return {"vocab.txt": self._vocab}

    def preprocess(self, image: Image.Image) -> Tensor:
        """Bilinear resize of the float tensor to a square, without antialiasing and without a crop."""
        pixels = to_tensor(image.convert("RGB")).unsqueeze(0)
        size = (self.image_size, self.image_size)
        return self.normalise(F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)[0])

    def place_boxes(self, boxes: Sequence[Sequence[Box]], sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Scale and pad the boxes of N pictures of `sizes` (width, height) for `encode_pixels`: [N, B, 4], mask [N, B].

        Boxes beyond `box_slots` - 1 are dropped; the whole picture comes after the last. Raises `ValueError` for a
        box that does not have four numbers.
        """
        placed = torch.zeros(len(boxes), self.config.box_slots, 4)
        mask = torch.zeros(placed.shape[:2])
        for row, slots, given, (width, height) in zip(placed, mask, boxes, sizes, strict=True):
            kept = [*given][: self.config.box_slots - 1]
            if wrong := [box for box in kept if len(box) != 4]:
                raise ValueError(f"a box is x1, y1, x2, y2, not {wrong[0]}")
            ratios = [self.image_size / width, self.image_size / height] * 2
            scaled = [[corner * ratio for corner, ratio in zip(box, ratios, strict=True)] for box in kept]
            row[: len(kept) + 1] = torch.tensor([*scaled, [0.0, 0.0, self.image_size, self.image_size]])
            slots[: len(kept) + 1] = 1
        return placed, mask

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """`ids` and `mask`, [N, text_tokens]."""
        ids = self._pieces(texts, self.config.text_tokens)
        return {"ids": ids, "mask": (ids != 0).float()}

    def encode_pixels(self, pixels: Tensor, boxes: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """[N, 3, S, S], and the output of `place_boxes` if there are boxes -> [N, D] of unit length."""
        if boxes is None:
            boxes = pixels.new_tensor([0.0, 0.0, self.image_size, self.image_size]).expand(len(pixels), 1, 4)
        if mask is None:
            mask = boxes.new_ones(boxes.shape[:2])
        return unit(self.image(pixels, boxes, mask))

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        assert isinstance(tokens, dict)
        return unit(self.text(tokens["ids"], tokens["mask"]))


def pool_boxes(features: Tensor, boxes: Tensor, image_size: int, grid_size: int) -> Tensor:
    """The mean of `grid_size` x `grid_size` bilinear samples of each box: [N, C, h, w], [N, B, 4] -> [N, C, B].

    As in the original, the affine maps assume corners at pixel centres (align_corners=True), but sampling assumes them
    at pixel edges (False), with zeros outside. This enlarges and shifts every box a little, and the published weights
    were trained with it.
    """
    height, width = features.shape[2:]
    x1, y1, x2, y2 = (boxes * (height / image_size)).unbind(-1)  # [N, B]; one ratio for both axes
    zeros = torch.zeros_like(x1)
    rows = [
        torch.stack([(x2 - x1) / (width - 1), zeros, (x1 + x2 - width + 1) / (width - 1)], -1),
        torch.stack([zeros, (y2 - y1) / (height - 1), (y1 + y2 - height + 1) / (height - 1)], -1),
    ]
    count = boxes.shape[1]
    maps = torch.stack(rows, -2).flatten(0, 1).to(features)  # [N * B, 2, 3]
    grid = F.affine_grid(maps, [len(maps), 1, grid_size, grid_size], align_corners=False)
    # stack the boxes of a picture along the height, so that each picture is sampled in one call
    grid = grid.view(len(boxes), count * grid_size, grid_size, 2)
    samples = F.grid_sample(features, grid, align_corners=False)  # [N, C, B * grid_size, grid_size]
    return samples.unflatten(2, (count, grid_size)).mean((3, 4))


def trainable_names(towers: BrivlTowers) -> set[str]:
    """The parameters that the original trains: backbone blocks 3 to 6, BERT layers 8 to 11, the added parts."""
    first = 20 if towers.config.bert.num_hidden_layers == 24 else 8  # 24: RoBERTa-large, also published
    parts = [f"image.backbone.blocks.{block}." for block in range(3, 7)]
    parts += [f"text.backbone.encoder.layer.{layer}." for layer in range(first, first + 4)]
    parts += [f"{tower}.{part}." for tower in ("image", "text") for part in ("project", "pool", "head")]
    return {name for name, _ in towers.named_parameters() if name.startswith(tuple(parts))}
