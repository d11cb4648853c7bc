"""Damaged folders of transformers, as `bench/load/hostile_imports.py` damages models: refused, or imported right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bench.load.hostile_imports import BAD, prepare, run_case
from bench.load.imported_models import Model
from retrieval.towers.importing import import_transformers
from tests.helpers.hub_folders import write_hub_folder

CASES = 20
# numbers of these names are never looked at, by us or by transformers, where towers make vectors
INERT = ("initializer_range", "initializer_factor", "logit_scale_init_value", "bos_token_id", "pad_token_id")


def hub_model(kind: str, folder: Path) -> Model:
    """What transformers wrote, with random weights, as a model that can be damaged."""
    write_hub_folder(folder, kind)
    settings = {name: json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json")}
    for section in (settings["config.json"], *settings["config.json"].values()):
        if isinstance(section, dict):
            for name in INERT if kind != "altclip" else INERT[:-1]:  # AltCLIP counts places from its padding
                section.pop(name, None)
    texts = {name: (folder / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
    weights = load_file(folder / "model.safetensors")
    return Model(kind, weights, dict, "model.safetensors", import_transformers, settings, texts)


@pytest.mark.parametrize("kind", ["clip", "siglip2", "altclip"])
def test_hostile_folders_are_refused_in_one_line_or_imported_right(kind: str, tmp_path: Path) -> None:
    all_models = [hub_model(kind, tmp_path / "written")]
    prepare(all_models, tmp_path)
    for case in range(CASES):
        outcome = run_case(case, 1, all_models, tmp_path)
        assert outcome.result not in BAD, outcome
