"""Imports of damaged models: a hundred cases of `bench/load/hostile_imports.py`; settings that are out of bounds."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from bench.load.hostile_imports import BAD, prepare, run_case
from bench.load.imported_models import Model, models
from mmwudao.cli.app import run
from retrieval.towers.foreign import check_numbers, check_trunk
from vqvae.storage.parts import ModelError


@pytest.fixture(scope="module")
def all_models() -> list[Model]:
    return models()


@pytest.fixture(scope="module")
def folder(all_models, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("hostile")
    prepare(all_models, place)
    return place


# CogView's two are imported in milliseconds, towers are built from open_clip, timm and transformers first
@pytest.mark.parametrize("place", range(6))
def test_hostile_models_are_refused_in_one_line_or_imported_right(all_models, folder, place):
    for case in [place + len(all_models) * number for number in range(35 if place < 2 else 8)]:
        outcome = run_case(case, 1, all_models, folder)
        assert outcome.result not in BAD, outcome


def test_the_comparison_sees_what_is_wrong(all_models, folder, monkeypatch):
    """With the checks left out, damaged models come through, and are called wrong."""
    monkeypatch.setattr("vqvae.storage.published.check_tensors", lambda *_, **__: None)
    results = {run_case(case, 1, all_models[:2], folder).result for case in range(1000, 1040)}
    assert results & set(BAD)


def brivl(all_models: list[Model], folder: Path, **changes: object) -> Path:
    model = next(model for model in all_models if model.name == "BriVL")
    model.write(folder / "brivl")
    record = {"MODEL": {**model.settings["cfg.yml"]["MODEL"], **changes}}
    (folder / "brivl/cfg.yml").write_text(yaml.safe_dump(record))
    return folder / "brivl"


def command(source: Path, out: Path) -> list[str]:
    options = ["--text-model", str(source), "--config", str(source / "cfg.yml"), "--out", str(out)]
    return ["import", "brivl", str(source / "brivl.pth"), *options]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"GRID_SIZE": 0}, "grid_size must be a whole number"),
        ({"TEMPERATURE": 0}, "temperature must be a number"),
        ({"TEMPERATURE": float("nan")}, "temperature must be a number"),
        ({"IMG_SIZE": -5}, "image_size must be a whole number"),
        ({"MAX_TEXT_LEN": 1}, "text_tokens must be a whole number"),
        ({"IMG_TRANSFORMER_LAYER": 10**9}, "image_layers must be a whole number"),
        ({"CNN": "hf-hub:timm/resnet18.a1_in1k"}, "Unknown model 'hf-hub:timm/resnet18.a1_in1k': not of timm"),
        ({"CNN": "local-dir:/etc"}, "Unknown model"),
        ({"CNN_OPTIONS": {"pretrained": True}}, "may not hold pretrained"),
        ({"CNN_OPTIONS": {"checkpoint_path": "a.pt"}}, "may not hold checkpoint_path"),
        ({"CNN_OPTIONS": {"depth_multiplier": 1e4}}, "depth_multiplier must be a number from 0.01 to 16.0"),
    ],
)
def test_settings_out_of_bounds(all_models, tmp_path, capsys, monkeypatch, changes, message):
    def connect(*_):
        raise AssertionError("an import goes to the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    assert run(command(brivl(all_models, tmp_path, **changes), tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_numbers_of_foreign_settings():
    check_numbers({"width": 64, "layers": [1, 2], "quick_gelu": True, "name": "x", "patch_size": None, "lr": 0.5}, "c")
    for record, message in (
        ({"a": {"width": 0}}, r"c: a.width must be a whole number from 1 to 65536, not 0"),
        ({"layers": [1, 10**6]}, "c: layers must be a whole number from 1 to 256"),
        ({"layers": True}, "layers must be a whole number"),
        ({"width": 2.5}, "width must be a whole number"),
        ({"width": "64"}, "width must be a number, not '64'"),
        ({"layers": []}, "layers must be a number"),
        ({"lr": float("nan")}, "lr must be a number"),
        ({"lr": 10**30}, "lr must be a number"),
        ({"many": [[0] * 200] * 100}, "at most 10000 values"),
    ):
        with pytest.raises(ModelError, match=message):
            check_numbers(record, "c")
    shared: list = [0]
    for _ in range(60):  # as YAML's references make them: 2^60 values in a few lines
        shared = [shared, shared]
    with pytest.raises(ModelError, match="at most 10000 values"):
        check_numbers({"many": shared}, "c")
    check_trunk("resnet18", {"output_stride": 32})


def test_programs_beside_a_text_tower_are_refused(tmp_path, capsys, all_models):
    model = next(model for model in all_models if model.name == "OpenCLIP")
    model.write(tmp_path / "source")
    (tmp_path / "source/tokenizer_config.json").write_text(json.dumps({"auto_map": {}, "model_max_length": 10**30}))
    assert run(["import", "open-clip", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 2
    assert "names a program (auto_map)" in capsys.readouterr().err


def test_a_file_that_is_missing_is_said_before_anything_heavy_is_imported(tmp_path):
    commands = [
        ["chinese-clip", "nosuch.pt"],
        ["brivl", "nosuch.pt", "--text-model", "."],
        ["open-clip", "nosuch.pt"],
        ["cogview", "--tokenizer", "nosuch.pt", "--generator", ".", "--text-model", "."],
    ]
    script = (
        "import json, sys; from mmwudao.cli.app import run\n"
        "codes = [run(['import', *command, '--out', 'out']) for command in json.loads(sys.argv[1])]\n"
        "print(codes, sorted({'torch', 'timm', 'open_clip', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
    )  # fmt: skip
    assert done.stdout == "[2, 2, 2, 2] []\n"
    assert done.stderr == "error: no checkpoint at nosuch.pt\n" * 4


def test_a_checkpoint_without_a_section_says_what_it_is(tmp_path, capsys, all_models):
    model = next(model for model in all_models if model.name == "Chinese-CLIP")
    source = brivl(all_models, tmp_path)
    torch.save({"state_dict": dict.fromkeys(map(str, range(500)))} | model.weights, source / "brivl.pth")
    assert run(command(source, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "no weights under the key 'learnable', but " in error
    assert "keys (state_dict, " in error
    assert "it looks like a training checkpoint with its weights under 'state_dict'" in error
    assert len(error) < 500
