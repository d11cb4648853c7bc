"""A generator as towers: its own vectors of texts and pictures, wherever those of towers are taken.

Shapes: N texts or pictures, T tokens in a row, h x w codes in a picture, C numbers in a vector.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from data.text import TextTokenizer
from generation.rows.match import MatchRows
from generation.rows.row import collate
from generation.transformer.model import Transformer
from mmwudao.loading.loaded import load_parts
from mmwudao.loading.model_dir import find_model, read_model_config
from retrieval.towers.base import Tokens, Towers, token_counts
from vqvae.storage.parts import ModelError, read_empty_part
from vqvae.tokenizers import ImageTokenizer

log = logging.getLogger(__name__)


class GeneratorTowers(Towers):
    """The vectors that a generator reads at [ENC]; their content hash is that of the generator and its tokenizer."""

    kind: ClassVar[str] = "generator"
    pixel_mean = (0.0, 0.0, 0.0)
    pixel_std = (1.0, 1.0, 1.0)

    def __init__(self, generator: Transformer, tokenizer: ImageTokenizer, text: TextTokenizer, image_size: int) -> None:
        super().__init__()
        self.generator, self.tokenizer, self.text = generator, tokenizer, text
        self.rows = MatchRows(generator.config)
        self.embed_dim, self.image_size = generator.config.match.width, image_size

    @property
    def scale(self) -> Tensor:
        return self.generator.match_head.scale

    @property
    def dtype(self) -> torch.dtype:
        """The tokenizer's, float32: a rounded pixel may get another code."""
        return torch.float32

    def tokenize(self, texts: list[str]) -> Tokens:
        """Ids [N, T] of rows that end in [ENC], with [PAD] behind them."""
        pieces = [self.text.encode(text) for text in texts]
        longest = self.generator.config.max_text
        if cut := sum(len(one) > longest for one in pieces):
            log.warning("%d of %d texts are cut: the generator reads %d pieces", cut, len(texts), longest)
        rows = [self.rows.text_row(one) for one in pieces]
        return collate(self.generator.config.vocabulary, rows).tokens

    def count_tokens(self, tokens: Tokens) -> list[int]:
        assert isinstance(tokens, Tensor)
        return token_counts(tokens, self.generator.config.vocabulary.command("[PAD]"))

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        assert isinstance(tokens, Tensor)
        # all texts have the positions of the longest that may be
        longest = self.rows.text_row([0] * self.generator.config.max_text).positions
        return self._vectors(tokens, longest[: tokens.shape[1]])

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        # one at a time: a batch's convolutions may round differently, and give a picture other codes
        codes = torch.cat([self.tokenizer.encode(one) for one in pixels.split(1)]).cpu()
        rows = [self.rows.picture_row(one) for one in codes]
        return self._vectors(torch.stack([row.tokens for row in rows]), rows[0].positions)

    def _vectors(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The vectors [N, C] of rows, `tokens` [N, T] at the `positions` [T] or [T, 2] that all of them have."""
        tokens = tokens.to(self.device)
        # causal: what stands behind [ENC] changes nothing
        hidden = self.generator(tokens, positions.to(self.device).expand(len(tokens), *positions.shape))
        return self.generator.vectors(hidden, tokens)


def check_generator_vectors(model: Path | str) -> None:
    """Raises `ModelError` unless the generator of a model makes vectors; no weights are read."""
    if (Path(model) / "model.safetensors").exists():
        raise ModelError(f"{model} is a part alone: --by generator takes a whole model (mmwudao assemble)")
    folder = find_model(model)
    generator = read_empty_part(Transformer, folder / read_model_config(folder).parts["generator"].path)
    if not generator.config.match.used:
        raise ModelError(
            f"the generator of {str(model)!r} makes no vectors: leave out --by generator, or train one with "
            "model.match.width and mix.match"
        )


def load_generator_towers(model: Path | str, device: torch.device, dtype: torch.dtype) -> GeneratorTowers:
    """The generator of a model as towers, in eval mode, in `dtype`. Raises `ModelError` for one that cannot."""
    check_generator_vectors(model)
    parts = load_parts(model)
    assert isinstance(parts.text, TextTokenizer), "a generator with vectors was trained here"
    tokenizer = parts.tokenizer.to(device=device, dtype=torch.float32)
    generator = parts.generator.to(device=device, dtype=dtype)
    return GeneratorTowers(generator, tokenizer, parts.text, parts.config.image_size).eval()
