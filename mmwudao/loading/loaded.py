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

from data.text import TextTokenizer
from generation.drawing.memory import DrawingMemory, plan_drawing
from generation.transformer.adapters import AdapterConfig
from generation.transformer.int8 import is_quantised
from generation.transformer.model import Transformer
from mmwudao.loading.model_dir import ModelConfig, check_hash, check_pairing, find_model, read_model_config
from vqvae.model import VQVAE
from vqvae.storage.parts import ModelError, content_hash, load_part

if TYPE_CHECKING:
    from retrieval.towers.base import Towers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelParts:
    """What a model directory holds for drawing, and the directory itself."""

    folder: Path
    config: ModelConfig
    tokenizer: VQVAE
    generator: Transformer
    text: TextTokenizer


def load_parts(model: str | Path) -> ModelParts:
    """The parts as they are stored, checked against config.json and against each other. Raises `ModelError`."""
    folder = find_model(model)
    config = read_model_config(folder)
    tokenizer = load_part(VQVAE, folder / config.parts["tokenizer"].path)
    generator = load_part(Transformer, folder / config.parts["generator"].path)
    # byte pieces are not required: CogView's text model has none, and the hash shows that this is the right model
    text = TextTokenizer(folder / config.parts["text"].path, needs_bytes=False)
    hashes = {
        "tokenizer": content_hash(tokenizer),
        "generator": content_hash(generator),
        "text": text.content_hash,
    }
    for part, found in hashes.items():
        check_hash(folder, part, found, config.parts[part].hash)
    check_pairing(generator.config.tokenizer_hash, generator.config.text_hash, hashes)
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
            self.generator.config, self.tokenizer.config, dtype, self.device.type, self.grid, options=options
        )

    @cached_property
    def towers(self) -> Towers:
        """The model's retrieval towers. Raises `ModelError` when it has none."""
        from mmwudao.loading.towers import load_model_towers

        return load_model_towers(self.folder, self.device.type)

    @property
    def dtype(self) -> str:
        """The name of the transformer's number format, as `load` takes it."""
        if is_quantised(self.generator):
            return "int8"
        return str(self.generator.embed.weight.dtype).removeprefix("torch.")

    def encode_text(self, text: str) -> list[int]:
        """What the generator reads of a text, as raw pieces; a warning where it is cut."""
        pieces = self.text.encode(text)
        prompt = self.generator.config.vocabulary.prompt_pieces
        longest = self.generator.config.max_text - len(prompt)
        if len(pieces) > longest:
            read = self.text.decode(pieces[:longest])
            log.warning("the model reads %d pieces of text at most; it stops after %r", longest, read[-40:])
        return [*prompt, *pieces[:longest]]

    def decode_codes(self, codes: Tensor) -> Image.Image:
        """Codes [h, w] to a picture. One at a time: a batch's convolutions may round differently."""
        pixels = (self.tokenizer.decode(codes[None])[0] * 255).round().to("cpu", torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())
