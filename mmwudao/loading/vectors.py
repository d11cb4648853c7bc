"""Which part of a model makes vectors of texts and pictures: its towers, or its generator. One home for the choice."""

from __future__ import annotations

from pathlib import Path

from mmwudao.loading.devices import choose_device
from mmwudao.loading.options import VectorMaker
from retrieval.towers.base import DTYPES, Towers
from vqvae.storage.parts import ModelError


def load_vector_maker(by: VectorMaker, model: Path | str, device: str = "auto", dtype: str = "float32") -> Towers:
    """What `by` names, in eval mode: the towers of a model or of a folder, or a model's generator as towers.

    Raises `ModelError`, also for a model without that part, and `ValueError` for the device.
    """
    if by == "towers":
        from mmwudao.loading.towers import load_model_towers

        return load_model_towers(model, device, dtype)
    from mmwudao.loading.generator_towers import load_generator_towers

    if dtype not in DTYPES:
        raise ModelError(f"vectors are computed in {', '.join(DTYPES)}, not in {dtype!r}")
    return load_generator_towers(model, choose_device(device), DTYPES[dtype])
