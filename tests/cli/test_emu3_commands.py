"""A model of Emu3 behind every door: import, generate, replay, int8, complete, info, the service."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from mmwudao.cli.app import run
from mmwudao.pipeline import load
from mmwudao.service.generators import LocalGenerator
from mmwudao.service.queues import Served
from tests.helpers.cli import one_error
from tests.helpers.emu3 import PROMPT, make_emu3, save_emu3
from tests.helpers.service_server import running


@pytest.fixture(scope="module")
def emu3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emu3")
    source = save_emu3(make_emu3().bfloat16(), folder / "Emu3-Gen-hf")
    assert run(["import", "emu3", str(source), "-o", str(folder / "model"), "--image-size", "8"]) == 0
    return folder / "model"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_generate_and_replay(emu3: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "drawn"
    call = ["generate", PROMPT, "--model", str(emu3), "-o", str(out), "--dtype", dtype]
    assert run([*call, "-n", "2", "--seed", "3"]) == 0
    pictures = sorted(path for path in out.glob("*.png") if path.name != "grid.png")
    assert len(pictures) == 2
    with Image.open(pictures[0]) as picture:
        assert picture.size == (8, 8)
    capsys.readouterr()
    assert run(["replay", str(pictures[1]), "-o", str(tmp_path / "again.png")]) == 0
    assert "identical to the original" in capsys.readouterr().out


def test_complete_info_and_refusals(emu3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    call = ["complete", str(tmp_path / "red.png"), "--prompt", PROMPT, "--keep", "top:0.5", "--model", str(emu3)]
    assert run([*call, "-o", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert run(["info", str(emu3), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"]["text"]["dtype"] == "tokenizer.json"
    call = ["generate", "--model", str(emu3), "-o", str(tmp_path / "drawn")]
    assert run([*call, "word " * 80]) == 2
    assert "this model reads 256: shorten it" in one_error(capsys)
    assert run([*call, "a <|image start|> b"]) == 2
    assert "holds '<|image start|>', a mark" in one_error(capsys)
    assert not (tmp_path / "drawn").exists()


def test_the_service_draws_and_refuses(emu3: Path) -> None:
    served = Served("emu3", generator=LocalGenerator(load(emu3, device="cpu", dtype="float32")))
    with running(served) as url:
        body = {"prompt": PROMPT, "n": 2, "seed": 1, "size": "8x8"}
        drawn = httpx2.post(f"{url}/v1/images/generations", json=body)
        assert drawn.status_code == 200, drawn.text
        assert len(drawn.json()["data"]) == 2
        assert httpx2.post(f"{url}/v1/images/generations", json=body | {"size": "1024x1024"}).status_code == 400
