"""Chinese-CLIP (Yang et al. 2022, arXiv:2211.01335): a ViT or a ResNet and a Chinese RoBERTa, as published.

The modules are those of open_clip and transformers, with the published names. docs/retrieval-imports.md lists the
quirks of the original that are kept.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from data.config import from_dict, to_dict
from data.images import to_tensor
from data.records import parse_json
from retrieval.towers.base import Tokens, Towers, unit
from retrieval.towers.chinese_clip_config import ChineseClipConfig
from retrieval.towers.foreign import read_json_object
from retrieval.towers.word_pieces import WordPieces
from vqvae.storage.parts import ModelError


def read_published_config(vision: Path, text: Path) -> ChineseClipConfig:
    """Read the configuration from the two JSON files of the original. Raises `ModelError`."""
    records = read_json_object(vision) | read_json_object(text)
    try:
        layers = records["vision_layers"]
        return from_dict(
            ChineseClipConfig,
            {
                "embed_dim": records["embed_dim"],
                "image_size": records["image_resolution"],
                "vision_layers": parse_json(layers) if isinstance(layers, str) else layers,
                "vision_width": records["vision_width"],
                "vision_head_width": records.get("vision_head_width", 64),
                "patch_size": records["vision_patch_size"],
                "text_width": records["text_hidden_size"],
                "text_layers": records["text_num_hidden_layers"],
                "text_heads": records["text_num_attention_heads"],
                "text_hidden": records["text_intermediate_size"],
                "vocab_size": records["vocab_size"],
                "max_positions": records["text_max_position_embeddings"],
            },
        )
    except KeyError as error:
        raise ModelError(f"neither {vision} nor {text} says {error}") from error
    except ValueError as error:
        raise ModelError(f"{vision} and {text} do not describe towers: {error}") from error


class ChineseClipTowers(Towers):
    """Chinese-CLIP behind our interface, with the published `tokenize` and image transform."""

    kind = "chinese-clip"
    pixel_mean = (0.48145466, 0.4578275, 0.40821073)
    pixel_std = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, config: ChineseClipConfig, vocab: bytes) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = config.embed_dim
        self.image_size = config.image_size
        self.visual: nn.Module
        if isinstance(config.vision_layers, list):
            heads = config.vision_width * 32 // config.vision_head_width
            self.visual = ModifiedResNet(
                config.vision_layers, config.embed_dim, heads, config.image_size, config.vision_width
            )
        else:
            assert config.patch_size is not None
            heads = config.vision_width // config.vision_head_width
            self.visual = VisionTransformer(
                config.image_size, config.patch_size, config.vision_width, config.vision_layers, heads, mlp_ratio=4,
                output_dim=config.embed_dim, patch_dropout=config.patch_dropout, act_layer=QuickGELU,
            )  # fmt: skip
        text = BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            intermediate_size=config.text_hidden,
            max_position_embeddings=config.max_positions,
        )
        self.bert = BertModel(text, add_pooling_layer=False)
        self.text_projection = nn.Parameter(torch.randn(config.text_width, config.embed_dim) / config.text_width**0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._vocab = vocab
        self._pieces = WordPieces(vocab, google=True)
        if self._pieces.size > config.vocab_size:
            raise ModelError(f"vocab.txt has {self._pieces.size} pieces, and the towers only {config.vocab_size}")

    @property
    def scale(self) -> Tensor:
        return self.logit_scale.exp()

    @classmethod
    def from_config(cls, record: dict[str, Any], folder: Path) -> ChineseClipTowers:
        return cls(from_dict(ChineseClipConfig, record), (folder / "vocab.txt").read_bytes())

    def to_config(self) -> dict[str, Any]:
        return to_dict(self.config)

    def text_files(self) -> dict[str, bytes]:
        return {"vocab.txt": self._vocab}

    def preprocess(self, image: Image.Image) -> Tensor:
        """Resize to a square in the picture's own mode, then convert to RGB, as the original does (palettes, alpha)."""
        resized = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return self.normalise(to_tensor(resized.convert("RGB")))

    def tokenize(self, texts: list[str]) -> Tensor:
        """Ids [N, context_length]."""
        return self._pieces(texts, self.config.context_length)

    def raw_pixels(self, pixels: Tensor) -> Tensor:
        """Features before normalisation, [N, embed_dim]."""
        features: Tensor = self.visual(pixels)
        return features

    def raw_tokens(self, ids: Tensor) -> Tensor:
        """Features before normalisation, [N, embed_dim]: [CLS] of the last layer, without BERT's pooler."""
        hidden = self.bert(ids, attention_mask=(ids != 0).long()).last_hidden_state
        features: Tensor = hidden[:, 0] @ self.text_projection
        return features

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return unit(self.raw_pixels(pixels))

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        assert isinstance(tokens, Tensor)
        return unit(self.raw_tokens(tokens))


def normalise_caption(text: str) -> str:
    """Lower case and straight double quotes: the published data sets apply this to captions, `tokenize` does not."""
    return text.lower().replace("“", '"').replace("”", '"')


def halved_names(towers: ChineseClipTowers) -> set[str]:
    """The weights that the published loader rounds to half precision, even on a CPU.

    All of BERT, convolutions, linear layers, attention and both projections; not the norms and embeddings of the image
    tower and not `logit_scale`.
    """
    names = {f"bert.{name}" for name, _ in towers.bert.named_parameters()} | {"text_projection", "visual.proj"}
    for prefix, module in towers.visual.named_modules(prefix="visual"):
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.MultiheadAttention)):
            names |= {f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)}
    return names & towers.state_dict().keys()


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """A ViT's position embedding [1 + S*S, W] for a grid of `side` x `side`: [1 + side*side, W].

    Bicubic with aligned corners, as Chinese-CLIP's training and `load` do it; open_clip's own is antialiased.
    """
    cls, grid = positions[:1], positions[1:]
    old = math.isqrt(len(grid))
    if old == side:
        return positions
    square = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(side, side), mode="bicubic", align_corners=True)
    return torch.cat([cls, resized.permute(0, 2, 3, 1).reshape(side * side, -1)])
