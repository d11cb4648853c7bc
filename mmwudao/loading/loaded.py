"""A loaded model: its parts, where they are, and the way from text to pieces and from codes to a picture."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from data.framed_text import FramedTokenizer, ModelText, load_model_text
from data.images import to_rgb
from data.text import TextTokenizer
from generation.drawing.memory import DrawingMemory, plan_drawing
from generation.llamagen.encoders import VectorEncoder, encoder_bytes, load_prompt_encoder
from generation.rows.prompt import Prompt
from generation.transformer.adapters import AdapterConfig
from generation.transformer.expert_memory import open_generator
from generation.transformer.int8 import is_quantised
from generation.transformer.model import Transformer
from mmwudao.loading.model_dir import (
    ModelConfig,
    check_hash,
    check_pairing,
    check_prompt_encoder,
    check_prompt_towers,
    find_model,
    read_model_config,
)
from vqvae.storage.parts import ModelError, content_hash, load_part, stored_hash
from vqvae.tokenizers import ImageTokenizer, load_image_tokenizer

if TYPE_CHECKING:
    from mmwudao.loading.towers import LiveFeatures
    from retrieval.towers.base import Towers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelParts:
    """What a model directory holds for drawing, and the directory itself."""

    folder: Path
    config: ModelConfig
    tokenizer: ImageTokenizer
    generator: Transformer
    text: ModelText

    @property
    def encoder_bytes(self) -> int:
        """Bytes that the encoder of prompts takes, if there is one."""
        part = self.config.parts.get("encoder")
        return encoder_bytes(self.folder / part.path) if part else 0


def load_parts(
    model: str | Path, expert_memory: int | None = None, dtype: torch.dtype = torch.float32
) -> ModelParts:
    """The parts as they are stored, checked against config.json and against each other. Raises `ModelError`.

    With `expert_memory` (bytes) the generator is in `dtype`, and its experts stay in their file
    (`generation.transformer.expert_memory.open_generator`).
    """
    folder = find_model(model)
    config = read_model_config(folder)
    tokenizer = load_image_tokenizer(folder / config.parts["tokenizer"].path)
    place = folder / config.parts["generator"].path
    if expert_memory is None:
        generator = load_part(Transformer, place)
        generator_hash = content_hash(generator)
    else:
        generator, generator_hash = open_generator(place, expert_memory, dtype)
    text = load_model_text(folder / config.parts["text"].path)
    hashes = {
        "tokenizer": content_hash(tokenizer),
        "generator": generator_hash,
        "text": text.content_hash,
    }
    for part, found in hashes.items():
        check_hash(folder, part, found, config.parts[part].hash)
    check_pairing(generator.config.tokenizer_hash, generator.config.text_hash, hashes)
    if generator.config.prompt_features.used:
        towers = config.parts.get("towers")
        check_prompt_towers(generator.config.prompt_features, towers.hash if towers else None)
        if towers is not None:
            check_hash(folder, "towers", stored_hash(folder / towers.path), towers.hash)
    encoder = config.parts.get("encoder")
    if encoder is not None:
        check_hash(folder, "encoder", stored_hash(folder / encoder.path), encoder.hash)
    check_prompt_encoder(generator.config.prefix_width, folder / encoder.path if encoder else None)
    if config.image_size % tokenizer.config.stride:
        raise ModelError(f"{folder}: image_size must be a multiple of {tokenizer.config.stride}")
    return ModelParts(folder, config, tokenizer, generator, text)


class LoadedModel:
    """The parts of a model, checked and on their device.

    `source` is what `load` was asked for, `folder` where it was found; `adapter` describes the style that the generator
    has been given, if any. `grid` is the height and the width of a picture in codes.
    """

    def __init__(self, source: str, parts: ModelParts, adapter: AdapterConfig | None = None) -> None:
        self.source, self.adapter = source, adapter
        self.folder, self.config = parts.folder, parts.config
        self.tokenizer, self.generator, self.text = parts.tokenizer, parts.generator, parts.text
        self.encoder_bytes = parts.encoder_bytes
        side = self.config.image_size // self.tokenizer.config.stride
        self.grid = (side, side)

    @property
    def device(self) -> torch.device:
        return next(self.generator.parameters()).device

    @cached_property
    def memory(self) -> DrawingMemory:
        """The memory that drawing takes."""
        dtype = self.generator.embed.weight.dtype
        options = self.config.default_sampling
        return plan_drawing(
            self.generator.config, self.tokenizer.config, dtype, self.device.type, self.grid, options=options,
            eight_bits=is_quantised(self.generator), encoder=self.encoder_bytes,
            expert_memory=self.generator.expert_bytes,
        )  # fmt: skip

    @cached_property
    def towers(self) -> Towers:
        """The model's retrieval towers. Raises `ModelError` when it has none."""
        from mmwudao.loading.towers import load_model_towers

        return load_model_towers(self.folder, self.device.type)

    @cached_property
    def features(self) -> LiveFeatures | None:
        """The source of the vectors in prompts; None for a generator that reads none.

        Raises `ModelError` for towers whose vectors do not fit.
        """
        from mmwudao.loading.towers import LiveFeatures

        wanted = self.generator.config.prompt_features
        if not wanted.used:
            return None
        if self.towers.embed_dim != wanted.width:
            raise ModelError(
                f"{self.source}: the generator reads vectors of {wanted.width} numbers, and the towers make "
                f"{self.towers.embed_dim}: put the towers beside it that it was trained with"
            )
        return LiveFeatures(self.towers, self.config.styles)

    @cached_property
    def prompt_encoder(self) -> VectorEncoder | None:
        """What makes the vectors that stand for a prompt; None for a generator that reads pieces of text."""
        part = self.config.parts.get("encoder")
        return load_prompt_encoder(self.folder / part.path, self.device) if part else None

    @property
    def dtype(self) -> str:
        """The name of the transformer's number format, as `load` takes it."""
        if is_quantised(self.generator):
            return "int8"
        return str(self.generator.embed.weight.dtype).removeprefix("torch.")

    def encode_text(self, text: str) -> list[int]:
        """What the generator reads of a text, as raw pieces; a warning where it is cut.

        Raises `ValueError` for one that cannot be cut: its chat template would have no end.
        """
        pieces, longest = self._pieces(text), self.reads
        if len(pieces) > longest:
            read = self._decode_start(pieces[:longest])
            log.warning("the model reads %d pieces of text at most; it stops after %r", longest, read[-40:])
        return [*self.generator.config.vocabulary.prompt_pieces, *pieces[:longest]]

    @property
    def reads(self) -> int:
        """How many pieces of a text the generator reads."""
        return self.generator.config.max_text - len(self.generator.config.vocabulary.prompt_pieces)

    @property
    def reads_surely(self) -> int:
        """A text of so many bytes is read whole, whatever it says: a piece of text has a byte or more."""
        return self.reads if isinstance(self.text, TextTokenizer) else 0

    def read_part(self, text: str) -> str | None:
        """What the generator reads of a text that is too long for it; None: all of it. `ValueError`: `encode_text`."""
        pieces = self._pieces(text)
        return self._decode_start(pieces[: self.reads]) if len(pieces) > self.reads else None

    def _pieces(self, text: str) -> list[int]:
        pieces = self.text.encode(text)
        if isinstance(self.text, FramedTokenizer) and len(pieces) > self.reads:
            raise ValueError(
                f"the prompt has {len(pieces)} pieces of text with its template, and this model reads {self.reads}: "
                "shorten it, or import the model with a larger --max-text if it has that option"
            )
        return pieces

    def _decode_start(self, pieces: list[int]) -> str:
        """The text of the first pieces of one, which may end inside a character: that is left out."""
        return self.text.decode(pieces).rstrip("\ufffd")

    def encode_prompt(self, text: str, vector: Tensor | None = None) -> Prompt:
        """What the generator reads of a prompt: its pieces, and the vectors of it if the generator reads them.

        `vector` [1, C] takes the place of the text's own. An empty text has no pieces. Where vectors are the prompt,
        its pieces are the last places of a row, one for each.
        """
        if self.prompt_encoder is not None:
            vectors, longest = self.prompt_encoder.vectors(self._pieces(text)), self.generator.config.max_text
            return Prompt(tuple(range(longest - len(vectors), longest)), vectors)
        if vector is None and self.features is not None:
            vector = self.features.of_text(text)
        return Prompt(tuple(self.encode_text(text)) if text else (), vector)

    def encode_like(self, image: Image.Image) -> Tensor:
        """The vector [1, C] of a picture, to draw from. Raises `ModelError` for a generator that reads none."""
        if self.features is None or self.generator.config.prompt_features.kind != "both":
            raise ModelError(f"{self.source} was not trained to draw from a picture: give a prompt alone")
        return self.features.of_picture(to_rgb(image))

    def decode_codes(self, codes: Tensor) -> Image.Image:
        """Codes [h, w] to a picture. One at a time: a batch's convolutions may round differently."""
        pixels = (self.tokenizer.decode(codes[None])[0] * 255).round().to("cpu", torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())
