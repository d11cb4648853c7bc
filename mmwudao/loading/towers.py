"""Loads the towers of a model directory or a shipped model, or those of a folder of towers."""

from __future__ import annotations

from pathlib import Path

from mmwudao.loading.devices import choose_device
from mmwudao.loading.model_dir import check_hash, find_model, read_model_config
from retrieval.towers.base import Towers, load_towers
from vqvae.storage.parts import ModelError, stored_hash


def load_model_towers(model: Path | str, device: str = "auto", dtype: str = "float32") -> Towers:
    """The towers in eval mode. Raises `ModelError`, also if the model has none, and `ValueError` for the device."""
    where = choose_device(device)
    if (Path(model) / "model.safetensors").exists():
        return load_towers(model, where, dtype)
    folder = find_model(model)
    parts = read_model_config(folder).parts
    if "towers" not in parts:
        raise ModelError(f"the model {str(model)!r} has no towers: give a model that has, or a folder of towers")
    part = parts["towers"]
    check_hash(folder, "towers", stored_hash(folder / part.path), part.hash)
    return load_towers(folder / part.path, where, dtype)
