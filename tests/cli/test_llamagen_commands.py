"""Models of LlamaGen behind every door: import, generate, replay, int8, info, assemble, the service."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from mmwudao.cli.app import run
from mmwudao.pipeline import load
from mmwudao.service.generators import LocalGenerator
from mmwudao.service.queues import Served
from tests.helpers.cli import one_error
from tests.helpers.llamagen import write_checkpoints, write_t5
from tests.helpers.service_server import running
from vqvae.storage.parts import ModelError

SIZES = ["--image-size", "8", "--heads", "4", "--layers", "2"]
PROMPTS = {"classes": ["3", "tiger"], "captions": ["A red fox, at dawn.", "two boats"], "stored": ["fog", "Two boats"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("llamagen")
    files = write_checkpoints(folder / "published")
    write_t5(folder / "t5")
    names = ["cat", "dog", "fox", "wolf, grey wolf", "bear", "tiger", "lion", "boat", "ship", "hat"]
    (folder / "names.txt").write_text("\n".join(names))
    options = {
        "classes": ["c2i", "--classes", str(folder / "names.txt")],
        "captions": ["t2i", "--t5", str(folder / "t5")],
        "stored": ["t2i", "--vectors", str(files["vectors"])],
    }
    for name, (kind, *more) in options.items():
        call = ["import", "llamagen", str(files[kind]), "--tokenizer", str(files["vq"]), "-o", str(folder / name)]
        assert run([*call, *SIZES, *more]) == 0
    return {name: folder / name for name in options}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("classes", "float32"),
        ("classes", "int8"),
        ("captions", "bfloat16"),
        ("captions", "int8"),
        ("stored", "float32"),
    ],
)
def test_generate_and_replay(
    models: dict[str, Path], tmp_path: Path, kind: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "drawn"
    call = ["generate", *PROMPTS[kind], "--model", str(models[kind]), "-o", str(out), "--dtype", dtype]
    assert run([*call, "-n", "2", "--seed", "3"]) == 0
    pictures = sorted(path for path in out.glob("*.png") if path.name != "grid.png")
    assert len(pictures) == 4
    with Image.open(pictures[0]) as picture:
        assert picture.size == (8, 8)
    capsys.readouterr()
    assert run(["replay", str(pictures[3]), "-o", str(tmp_path / "again.png")]) == 0
    assert "identical to the original" in capsys.readouterr().out


def test_what_it_does_not_know_is_said(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, prompt, message in (
        ("classes", "tigre", "no class 'tigre': give one of its 10, by name or by number from 0 to 9, such as 'tiger'"),
        ("stored", "a blue fox", "no prompt 'a blue fox': give one of its 3"),
        ("captions", "一只狗", "nothing of the prompt is left for this model, which reads English"),
        ("captions", "word " * 60, "this model reads 120: shorten it"),
    ):
        call = ["generate", prompt, "--model", str(models[kind]), "-o", str(tmp_path / "drawn")]
        assert run(call) == 2
        assert message in one_error(capsys)
        assert not (tmp_path / "drawn").exists()


def test_complete_and_info(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    call = ["complete", str(tmp_path / "red.png"), "--prompt", "a red fox", "--keep", "top:0.5"]
    assert run([*call, "--model", str(models["captions"]), "-o", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert run(["info", str(models["captions"]), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parts"]["encoder"]["dtype"] == "bfloat16"
    assert told["memory"]["cpu"]["encoder"] >= 2 * told["parts"]["encoder"]["parameters"]
    assert run(["info", str(models["captions"])]) == 0
    assert "+ encoder of prompts 0.00 + cache" in capsys.readouterr().out
    assert run(["info", str(models["classes"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"]["text"] == {
        **json.loads(json.dumps(told["parts"]["text"])), "pieces": 10, "dtype": "names of each class",
        **{key: json_part(models["classes"])[key] for key in ("hash",)},
        "bytes": (models["classes"] / "text.json").stat().st_size,
    }  # fmt: skip


def json_part(model: Path) -> dict[str, str]:
    part: dict[str, str] = json.loads((model / "config.json").read_text())["parts"]["text"]
    return part


def test_the_service_draws_and_refuses(models: dict[str, Path]) -> None:
    served = [
        Served(kind, generator=LocalGenerator(load(models[kind], device="cpu", dtype="float32")))
        for kind in ("classes", "captions")
    ]
    for one, prompt, wrong in zip(served, ("tiger", "a red fox"), ("tigre", "狗"), strict=True):
        with running(one) as url:
            body = {"prompt": prompt, "n": 2, "seed": 1, "size": "8x8"}
            drawn = httpx2.post(f"{url}/v1/images/generations", json=body)
            assert drawn.status_code == 200, drawn.text
            assert len(drawn.json()["data"]) == 2
            assert httpx2.post(f"{url}/v1/images/generations", json=body | {"prompt": wrong}).status_code == 400
            assert httpx2.post(f"{url}/v1/images/generations", json=body | {"size": "512x512"}).status_code == 400


def test_a_model_needs_its_encoder(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["captions"]
    parts = {"tokenizer": "tokenizer", "generator": "generator", "text": "text.json"}
    options = [word for name, path in parts.items() for word in (f"--{name}", str(model / path))]
    call = ["assemble", *options, "--name", "again", "--image-size", "8"]
    assert run([*call, "-o", str(tmp_path / "none")]) == 2
    assert run([*call, "-o", str(tmp_path / "again"), "--encoder", str(model / "encoder")]) == 0
    pipeline = load(model, device="cpu")
    again = load(tmp_path / "again", device="cpu")
    assert again.config.model_hash == pipeline.config.model_hash
    assert load(pipeline.save(tmp_path / "copy"), device="cpu").config == pipeline.config
    damaged = shutil.copytree(model, tmp_path / "damaged")
    data = bytearray((damaged / "encoder" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "encoder" / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="encoder is not the one config.json names"):
        load(damaged, device="cpu")
