"""Loads the towers of a model directory, of a shipped model or of a folder of towers; their vectors in prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from PIL import Image
from torch import Tensor

from data.styles import without_style
from mmwudao.loading.devices import choose_device
from mmwudao.loading.model_dir import check_hash, find_model, read_model_config
from retrieval.towers.base import Towers, load_towers
from vqvae.storage.parts import ModelError, stored_hash


def load_model_towers(model: Path | str, device: str = "auto", dtype: str = "float32") -> Towers:
    """The towers in eval mode. Raises `ModelError`, also if the model has none, and `ValueError` for the device."""
    where = choose_device(device)
    return load_towers(find_towers(model)[0], where, dtype)


def find_towers(model: Path | str) -> tuple[Path, str]:
    """The folder of the towers of a model, or that folder itself, and their content hash. Raises `ModelError`."""
    if (Path(model) / "model.safetensors").exists():
        return Path(model), stored_hash(Path(model))
    folder = find_model(model)
    parts = read_model_config(folder).parts
    if "towers" not in parts:
        raise ModelError(f"the model {str(model)!r} has no towers: give a model that has, or a folder of towers")
    part = parts["towers"]
    check_hash(folder, "towers", stored_hash(folder / part.path), part.hash)
    return folder / part.path, part.hash


class FrozenTowers:
    """Towers that are loaded when they are first needed; a `generation.training.features.FeatureEncoder`."""

    def __init__(self, model: Path | str) -> None:
        """Raises `ModelError` for a model without towers."""
        self._folder, self.hash = find_towers(model)

    @cached_property
    def _towers(self) -> Towers:
        return load_towers(self._folder)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Float32 [N, C] of N texts."""
        return self._towers.encode_text(texts)

    def encode_image(self, images: Sequence[Image.Image]) -> Tensor:
        """Float32 [N, C] of N pictures."""
        return self._towers.encode_image(images)


class LiveFeatures:
    """The vectors of prompts by the towers of a loaded model; a `generation.rows.prompt.FeatureSource`."""

    def __init__(self, towers: Towers, styles: Iterable[str]) -> None:
        """`styles` are the picture families whose phrase is left out of a prompt."""
        self._towers, self._styles = towers, tuple(styles)
        self._vector = lru_cache(maxsize=4096)(self._encode)

    @property
    def width(self) -> int:
        return self._towers.embed_dim

    def of_text(self, text: str) -> Tensor:
        """Float32 [1, C] of a prompt, or of a caption, on the CPU."""
        return self._vector(without_style(text, self._styles))

    def of_sample(self, id: str) -> Tensor:
        """Raises `KeyError`: a loaded model knows no pictures of a training."""
        raise KeyError(id)

    def of_picture(self, image: Image.Image) -> Tensor:
        """Float32 [1, C] of a picture of any size, on the CPU."""
        return self._towers.encode_image([image])

    def _encode(self, text: str) -> Tensor:
        # alone: in a batch its padding, and so its bits, would depend on the others
        return self._towers.encode_text([text])
