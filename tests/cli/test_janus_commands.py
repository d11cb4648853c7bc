"""A model of Janus behind every door: import, generate, replay, candidates, int8, info, the service, the demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from generation.training.batches import RowMaker
from generation.training.config import GeneratorTrainConfig
from mmwudao.cli.app import run
from mmwudao.demo.actions import Actions, Result
from mmwudao.pipeline import load
from mmwudao.service.generators import LocalGenerator
from mmwudao.service.queues import Served
from retrieval.towers.base import save_towers
from tests.helpers.cli import one_error
from tests.helpers.http import CLIENT
from tests.helpers.janus import PROMPT, make_janus, save_janus
from tests.helpers.service_server import running
from tests.helpers.tiny_towers import tiny_towers


@pytest.fixture(scope="module")
def janus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("janus")
    source = save_janus(make_janus().bfloat16(), folder / "Janus-Pro-1B")
    save_towers(tiny_towers(), folder / "towers")
    call = ["import", "janus", str(source), "-o", str(folder / "model"), "--towers", str(folder / "towers")]
    assert run(call) == 0
    return folder / "model"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_generate_and_replay(janus: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "drawn"
    call = ["generate", PROMPT, "a blue fish", "--model", str(janus), "-o", str(out), "--dtype", dtype]
    assert run([*call, "-n", "2", "--seed", "3"]) == 0
    pictures = sorted(path for path in out.glob("*.png") if path.name != "grid.png")
    assert len(pictures) == 4
    with Image.open(pictures[0]) as picture:
        assert picture.size == (8, 8)
    capsys.readouterr()
    assert run(["replay", str(pictures[3]), "-o", str(tmp_path / "again.png")]) == 0
    assert "identical to the original" in capsys.readouterr().out


def test_a_picture_is_the_same_in_any_company(janus: Path) -> None:
    pipeline = load(janus, device="cpu", dtype="bfloat16")
    together = pipeline.generate(["a", PROMPT], n=2, seed=5)
    alone = pipeline.generate(PROMPT, seed=7)
    for one in (alone[0], together[2]):
        recipe: dict[str, Any] = dict(one.info)  # type: ignore[arg-type]
        assert pipeline.redraw(recipe).tobytes() == one.tobytes()
        assert recipe["guidance"] == 5.0
    assert together[3].info["seed"] == 8


def test_candidates_are_judged_by_the_towers(janus: Path, tmp_path: Path) -> None:
    out = tmp_path / "drawn"
    assert run(["generate", PROMPT, "--model", str(janus), "-o", str(out), "--candidates", "3", "--json"]) == 0


def test_what_it_cannot_do_is_said(janus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    assert run(["caption", str(tmp_path / "red.png"), "--model", str(janus)]) == 2
    assert "only draws" in one_error(capsys)


def test_complete_and_tokenize(janus: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    picture, out = str(tmp_path / "red.png"), str(tmp_path / "out")
    assert run(["complete", picture, "--prompt", PROMPT, "--keep", "top:0.5", "--model", str(janus), "-o", out]) == 0
    assert run(["tokenize", picture, "--model", str(janus), "-o", str(tmp_path / "codes"), "--size", "8"]) == 0


def test_info(janus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dtype in ("auto", "int8"):
        assert run(["info", str(janus), "--json", "--dtype", dtype]) == 0
    whole, eight = map(json.loads, capsys.readouterr().out.splitlines())
    assert whole["parts"]["text"]["dtype"] == "tokenizer.json"
    assert eight["memory"]["cuda"]["transformer"] < whole["memory"]["cuda"]["transformer"]
    assert eight["memory"]["cuda"]["rows"] == 2


def test_the_service_draws_and_refuses(janus: Path) -> None:
    served = Served("janus", generator=LocalGenerator(load(janus, device="cpu", dtype="float32")))
    with running(served) as url:
        body = {"prompt": PROMPT, "n": 2, "seed": 1, "size": "8x8"}
        drawn = CLIENT.post(f"{url}/v1/images/generations", json=body)
        assert drawn.status_code == 200, drawn.text
        assert len(drawn.json()["data"]) == 2
        for change, message in (
            ({"size": "1024x1024"}, "this model draws in these sizes: auto, 8x8"),
            ({"prompt": "word " * 100}, "this model reads 256: shorten it"),
            ({"prompt": "a <begin_of_image>"}, "a mark that the model reads otherwise"),
        ):
            refused = CLIENT.post(f"{url}/v1/images/generations", json=body | change)
            assert refused.status_code == 400
            assert message in refused.json()["error"]["message"]


def test_the_demo_draws(janus: Path, tmp_path: Path) -> None:
    actions = Actions(load(janus, device="cpu", dtype="float32"), None, tmp_path / "results")
    *previews, result = actions.draw(PROMPT, n=2, candidates=3, seed=1)
    assert isinstance(result, Result)
    assert previews
    assert len(result.pictures) == 2
    with pytest.raises(ValueError, match="shorten it"):
        list(actions.draw("word " * 100))


def test_it_is_not_trained(janus: Path) -> None:
    pipeline = load(janus, device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="cannot be trained here"):
        RowMaker(pipeline.text, pipeline.generator.config, GeneratorTrainConfig.__new__(GeneratorTrainConfig))


def test_a_copy_and_a_new_assembly_are_the_same_model(janus: Path, tmp_path: Path) -> None:
    pipeline = load(janus, device="cpu")
    assert load(pipeline.save(tmp_path / "copy"), device="cpu").config == pipeline.config
    parts = {"tokenizer": "tokenizer", "generator": "generator", "text": "text.json"}
    options = [word for name, path in parts.items() for word in (f"--{name}", str(janus / path))]
    call = ["assemble", *options, "--name", "again", "--image-size", "8", "-o", str(tmp_path / "again")]
    assert run(call) == 0
    assert load(tmp_path / "again", device="cpu").config.model_hash == pipeline.config.model_hash
