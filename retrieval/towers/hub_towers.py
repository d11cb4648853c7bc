"""Towers in the layout of Hugging Face's transformers: its models, its tokenizers and its preparation of pictures.

What each type does its own way, and what a folder may not say, is in `hub_settings.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from data.characters import whole_characters
from data.config import from_dict
from data.images import to_rgb
from retrieval.towers.base import Tokens, Towers, shortened, token_counts, unit
from retrieval.towers.foreign import check_numbers, without_network
from retrieval.towers.hub_settings import (
    LOWERING,
    TOKENIZER_FILES,
    TOWER_TYPES,
    TextRules,
    check_picture_rules,
)
from retrieval.towers.settings import TransformersImport
from retrieval.towers.word_pieces import warn_cut
from vqvae.storage.parts import ModelError, without_weights

SETTINGS_HASH = "settings_hash"


class TransformersTowers(Towers):
    """A model of transformers with its sections of config.json; `folder` holds the files of its tokenizer.

    Raises `ModelError` for settings that contradict each other.
    """

    kind = "transformers"
    settings_hash: Tensor

    def __init__(self, config: dict[str, Any], pictures: dict[str, Any], text: TextRules, folder: Path) -> None:
        super().__init__()
        check_numbers(config, "config.json")
        check_picture_rules(pictures, "the settings of pictures")
        self.config, self.pictures, self.text = config, pictures, text
        names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
        self._text_files = {name: (folder / name).read_bytes() for name in names}
        with without_weights(), without_network():
            self.model: Any = getattr(transformers, TOWER_TYPES[tower_type(config)].model)(_hub_config(config))
        self._processor: Any = _picture_processor(pictures)
        self._tokenizer: Any = load_hub_tokenizer(text.tokenizer, folder)
        self._packs = tower_type(config) == "siglip2"
        self.embed_dim = self._embed_dim()
        self.image_size = self._image_size()
        self.pixel_mean, self.pixel_std = tuple(self._processor.image_mean), tuple(self._processor.image_std)
        self._check_text()
        self.register_buffer(SETTINGS_HASH, self._hash_of_settings())

    @property
    def scale(self) -> Tensor:
        return self.model.logit_scale.exp().reshape(())

    @classmethod
    def from_config(cls, record: dict[str, Any], folder: Path) -> TransformersTowers:
        """The towers without numbers, for which `load_state_dict` puts those that it is given."""
        if tower_type(record["model"]) not in TOWER_TYPES:
            raise ModelError(f"{folder} holds a model of the type {tower_type(record['model'])!r}, which is not read")
        return cls(record["model"], record["pictures"], from_dict(TextRules, record["text"]), folder)

    def to_config(self) -> dict[str, Any]:
        return {"model": self.config, "pictures": self.pictures, "text": asdict(self.text)}

    def text_files(self) -> dict[str, bytes]:
        return self._text_files

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take these tensors in place of those without numbers."""
        return super().load_state_dict(state_dict, strict, assign=True)

    def restored_tensors(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        if not torch.equal(stored.get(SETTINGS_HASH, torch.zeros(0)), self.settings_hash):
            raise ModelError("its config.json or a file of its tokenizer is not the one that was imported")
        return {name: stored[key] for name, key in hub_keys(self.state_dict(), stored).items()}

    def preprocess(self, image: Image.Image) -> Tensor:
        """A picture of any mode, [3, S, S]; of SigLIP 2 [P, patch numbers + 2], see `_packed`."""
        prepared = self._processor(images=shortened(to_rgb(image)), return_tensors="pt")
        if not self._packs:
            pixels: Tensor = prepared["pixel_values"][0]
            return pixels
        return _packed(prepared["pixel_values"], prepared["spatial_shapes"])[0]

    def tokenize(self, texts: list[str]) -> Tokens:
        """Ids [N, max_tokens], and where padding is hidden their mask."""
        rules, length = self.text, self.text.max_tokens
        texts = [rules.prefix + whole_characters(text) for text in texts]
        texts = [text.lower() for text in texts] if rules.lower else texts
        # one more token reveals which texts are cut
        rows = (
            self._tokenizer(texts, truncation=True, max_length=length + 1, padding=False)["input_ids"] if texts else []
        )
        longer = [place for place, row in enumerate(rows) if len(row) > length]
        for place in longer:
            rows[place] = self._tokenizer(texts[place], truncation=True, max_length=length, padding=False)["input_ids"]
        warn_cut(len(longer), len(texts), length)
        ids = torch.full((len(rows), length), int(self._tokenizer.pad_token_id))
        mask = torch.zeros(len(rows), length, dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        return {"ids": ids, "mask": mask} if rules.masked else ids

    def count_tokens(self, tokens: Tokens) -> list[int]:
        if not isinstance(tokens, Tensor):
            counts: list[int] = tokens["mask"].sum(dim=1).tolist()
            return counts
        counts = token_counts(tokens, int(self._tokenizer.pad_token_id))
        if self._tokenizer.eos_token_id == self._tokenizer.pad_token_id:  # SigLIP: the first of them is the text's own
            counts = [min(count + 1, tokens.shape[1]) for count in counts]
        return counts

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, embed_dim]; SigLIP 2 takes what `preprocess` packed as well as squares."""
        if not self._packs:
            return unit(_pooled(self.model.get_image_features(pixel_values=pixels)))
        if pixels.dim() == 4:
            pixels = self._packed_squares(pixels)
        values, mask, shapes = _unpacked(pixels)
        features = self.model.get_image_features(pixel_values=values, pixel_attention_mask=mask, spatial_shapes=shapes)
        return unit(_pooled(features))

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        if isinstance(tokens, Tensor):
            return unit(_pooled(self.model.get_text_features(input_ids=tokens)))
        return unit(_pooled(self.model.get_text_features(input_ids=tokens["ids"], attention_mask=tokens["mask"])))

    def _packed_squares(self, pixels: Tensor) -> Tensor:
        side = self._processor.patch_size
        rows, columns = (size // side for size in pixels.shape[2:])
        grid = pixels[:, :, : rows * side, : columns * side].unflatten(3, (columns, side)).unflatten(2, (rows, side))
        patches = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [N, rows * columns, side * side * 3]
        return _packed(patches, torch.tensor([[rows, columns]] * len(pixels)))

    def _embed_dim(self) -> int:
        if hasattr(self.model, "text_projection"):
            return int(self.model.text_projection.out_features)
        width, pictures = self.model.text_model.head.out_features, self.model.config.vision_config.hidden_size
        if width != pictures:
            raise ModelError(f"config.json makes vectors of {width} numbers for texts and {pictures} for pictures")
        return int(width)

    def _image_size(self) -> int:
        """The side of the squares; of SigLIP 2 that of a square with as many patches. Raises `ModelError`."""
        vision = self.model.config.vision_config
        if self._packs:
            if self._processor.patch_size != vision.patch_size:
                raise ModelError(
                    f"pictures are cut into patches of {self._processor.patch_size} pixels, and config.json says "
                    f"{vision.patch_size}"
                )
            return int(vision.patch_size) * isqrt(self._processor.max_num_patches)
        shape = list(self.preprocess(Image.new("RGB", (24, 40))).shape)
        if shape != [3, vision.image_size, vision.image_size]:
            raise ModelError(f"pictures are prepared as {shape}, and config.json says image_size {vision.image_size}")
        return int(vision.image_size)

    def _check_text(self) -> None:
        """Raise `ModelError` for a tokenizer that the text tower was not made with."""
        config, tokenizer = self.model.config.text_config, self._tokenizer
        kind, length = tower_type(self.config), self.text.max_tokens
        if tokenizer.pad_token_id is None:
            raise ModelError("the tokenizer names no token to pad with (pad_token)")
        if len(tokenizer) > config.vocab_size:
            raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, and config.json says {config.vocab_size}")
        if length > (most := most_tokens(self.config, config)):
            raise ModelError(f"the text tower has places for {most} tokens, not for {length}")
        if not TOWER_TYPES[kind].masked and length < config.max_position_embeddings:
            # the last place is pooled, and was always the last of all in training
            raise ModelError(f"a {kind} reads texts of exactly {config.max_position_embeddings} tokens, not {length}")
        # these towers look for one token by its number: another would silently be the first place of every text
        if kind == "metaclip_2" or (kind == "clip" and config.eos_token_id != 2):
            _same("eos_token_id", tokenizer.eos_token_id, config.eos_token_id)
        if kind == "altclip":  # places are counted from the padding
            _same("pad_token_id", tokenizer.pad_token_id, config.pad_token_id)

    def _hash_of_settings(self) -> Tensor:
        """SHA-256 of all but the weights: with it in the content hash, other settings are other towers."""
        digest = hashlib.sha256(json.dumps(self.to_config(), sort_keys=True).encode())
        for name, content in sorted(self._text_files.items()):
            digest.update(f"{name} {len(content)}\n".encode() + content)
        return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def tower_type(config: Mapping[str, Any]) -> str:
    """The `model_type` of a config.json."""
    return str(config.get("model_type"))


def most_tokens(config: Mapping[str, Any], text: Any) -> int:
    """How many tokens the text tower has places for; RoBERTa counts them from behind the padding token."""
    offset = text.pad_token_id + 1 if tower_type(config) == "altclip" else 0
    return int(text.max_position_embeddings) - offset


def hub_keys(wanted: Iterable[str], found: Iterable[str]) -> dict[str, str]:
    """Our name of each tensor -> its name in a file: AltCLIP's layers are called layer or layers, by version."""
    there = {re.sub(r"\.layer\.", ".layers.", key): key for key in found}
    return {name: there.get(re.sub(r"\.layer\.", ".layers.", name), name) for name in wanted}


def choose_text_rules(config: dict[str, Any], folder: Path, settings: TransformersImport) -> TextRules:
    """How the towers in a folder read texts: the tokenizer that transformers would take, and as in their training.

    Raises `ModelError` for a tokenizer that is missing, damaged or none of `TOKENIZERS`.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES if "config" not in name):
        raise ModelError("the folder has no tokenizer: neither tokenizer.json nor a vocabulary is there")
    try:
        with without_network():
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"the tokenizer is damaged or not whole ({' '.join(str(error).split())[:200]})") from error
    name = type(tokenizer).__name__.removesuffix("Fast")
    if name in ("TokenizersBackend", "PreTrainedTokenizer"):
        name = "PreTrainedTokenizerFast"
    kind = TOWER_TYPES[tower_type(config)]
    most = most_tokens(config, _hub_config(config).text_config)
    if kind.masked:
        most = min(most, kind.max_tokens or most, tokenizer.model_max_length)
    lower = kind.lower and name not in LOWERING
    return TextRules(name, settings.max_tokens or most, kind.masked, lower, settings.prefix)


def load_hub_tokenizer(name: str, folder: Path) -> Any:
    """The tokenizer of a class of `TOKENIZERS` from the files in `folder`. Raises `ModelError`."""
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ModelError(f"transformers {transformers.__version__} has no {name}: install a newer one")
    files = dict(kind.vocab_files_names)
    whole = files.pop("tokenizer_file", None)
    # without its files a tokenizer of transformers begins with an empty vocabulary, and says nothing
    if not (whole and (folder / whole).is_file()) and not all((folder / file).is_file() for file in files.values()):
        names = " and ".join(files.values())
        raise ModelError(f"{folder} has no tokenizer: {' or '.join(filter(None, [whole, names]))} is missing")
    try:
        with without_network():
            return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"the tokenizer of {folder} is damaged or not whole ({reason})") from error


def _hub_config(config: Mapping[str, Any]) -> Any:
    settings = dict(config)
    made = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    made._attn_implementation = "sdpa"
    return made


def _picture_processor(rules: dict[str, Any]) -> Any:
    settings = dict(rules)
    return getattr(transformers, settings.pop("processor"))(**settings)


def _pooled(features: Any) -> Tensor:
    """The features before normalisation; transformers 5 returns them among others."""
    pooled: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return pooled


def _same(name: str, tokenizer: int, config: int) -> None:
    if tokenizer != config:
        raise ModelError(f"the tokenizer says {name} {tokenizer}, and config.json says {config}")


def _packed(patches: Tensor, shapes: Tensor) -> Tensor:
    """Patches [N, P, D] of grids [N, 2] (rows, columns) -> [N, P, D + 2], one tensor that any dtype holds.

    The first added number is 1 where a patch belongs to the picture, the second where it is in its first row.
    """
    places = torch.arange(patches.shape[1])
    marks = torch.stack([places < shapes.prod(dim=1)[:, None], places < shapes[:, 1:]], dim=2)
    return torch.cat([patches, marks.to(patches)], dim=2)


def _unpacked(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `_packed`: patches, mask [N, P], shapes [N, 2]."""
    patches, mask, first = packed[..., :-2], packed[..., -2].long(), packed[..., -1].long()
    columns = first.sum(dim=1)
    return patches, mask, torch.stack([mask.sum(dim=1) // columns, columns], dim=1)
