"""`caption`, `rerank`, `complete` and `generate --candidates` from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mmwudao.cli.app import run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with red.png and blue.webp."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 32), "red").save("red.png")
    Image.new("RGB", (32, 32), "blue").save("blue.webp")
    return tmp_path


def with_model(folder: Path, *arguments: str) -> int:
    return run([*arguments, "--model", str(folder), "--device", "cpu"])


def test_caption(tiny_model_dir: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert with_model(tiny_model_dir, "caption", "red.png", "blue.webp") == 0
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["red.png", "blue.webp"]
    assert with_model(tiny_model_dir, "caption", "red.png", "--language", "all", "--json") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["language"] for one in told] == ["zh", "en", "fr", "de", "cs", "ja", "ko"]


def test_ask(tiny_model_dir: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["这是什么颜色？", "Welche Farbe ist das, und was?"]
    assert with_model(tiny_model_dir, "ask", "red.png", *asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert with_model(tiny_model_dir, "ask", "red.png", *asked, "--json") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["question"] for one in told] == asked
    assert [one["language"] for one in told] == ["zh", "de"]
    assert [one["answer"] for one in told] == lines
    assert all(0 < one["probability"] < 1 for one in told)
    assert with_model(tiny_model_dir, "ask", "red.png", asked[0], "--among", "红,蓝 ", "--language=ja", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["answer"] in ("红", "蓝")
    assert told["language"] == "ja"


def test_a_model_that_does_not_answer_says_so(
    tiny_model_dir: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model_dir, here / "silent")
    config = here / "silent" / "config.json"
    record = json.loads(config.read_text())
    del record["answers"]  # as in a model made before there was such a thing
    config.write_text(json.dumps(record))
    assert with_model(here / "silent", "ask", "red.png", "red?") == 2
    assert capsys.readouterr().err == f"error: {here / 'silent'} does not answer questions: it was not trained to\n"


def test_rerank_is_sorted(tiny_model_dir: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert with_model(tiny_model_dir, "rerank", "红心", "red.png", "blue.webp", "--json") == 0
    scores = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 2


def test_candidates(tiny_model_dir: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert with_model(tiny_model_dir, "generate", "红心", "-n", "2", "--candidates", "4", "--seed", "1", "--json") == 0
    kept = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(kept) == 2
    assert kept[0]["score"] >= kept[1]["score"]
    assert {one["seed"] for one in kept} <= {1, 2, 3, 4}
    # a kept picture is drawn again like any other
    assert run(["replay", kept[0]["path"]]) == 0


def test_complete(tiny_model_dir: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert with_model(tiny_model_dir, "complete", "red.png", "--prompt", "红心", "-n", "2", "--keep", "left:0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    with Image.open(lines[0]) as picture:
        assert picture.size == (32, 32)
    assert run(["replay", lines[0]]) == 2
    assert "completed from another picture" in capsys.readouterr().err


def test_complete_with_a_mask_and_beyond_a_side(
    filling_model_dir: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = Image.new("RGBA", (32, 32), "white")
    mask.paste((0, 0, 0, 0), (8, 8, 24, 16))
    mask.save("hole.png")
    command = ["complete", "red.png", "--prompt", "红心", "--json"]
    assert with_model(filling_model_dir, *command, "--mask", "hole.png") == 0
    assert json.loads(capsys.readouterr().out)["kept"] == "a mask"
    assert with_model(filling_model_dir, *command, "--extend", "top:0.5") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["kept"] == "all, extended top:0.5"
    with Image.open(record["path"]) as picture:
        assert picture.size == (32, 48)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption", "absent.png"], "no picture at absent.png"),
        (["caption", "text.png"], "text.png: not a picture"),
        (["caption", "red.png", "--language", "tlh"], "unknown language 'tlh'"),
        (["ask", "absent.png", "red?"], "no picture at absent.png"),
        (["ask", "red.png", " "], "an empty question"),
        (["ask", "red.png", "red?", "--language", "tlh"], "unknown language 'tlh'; this model answers in: zh, en"),
        (["ask", "red.png", "red?", "--among", "yes,"], "an empty answer to choose"),
        (["rerank", " ", "red.png"], "empty prompt"),
        (["rerank", "红心", "empty.png"], "empty.png"),
        (["complete", "red.png", "--prompt", "红心", "--keep", "bottom:0.5"], "top:0.5, left:0.5"),
        (["complete", "red.png", "--prompt", "红心", "--keep", "bottom.png"], "top or its left part"),
        (["complete", "red.png", "--prompt", "红心", "--extend", "left:0.5"], "not trained to fill holes"),
        (["complete", "red.png", "--prompt", "红心", "--extend", "up:0.5"], "left, right, top, bottom"),
        (["complete", "red.png", "--prompt", "红心", "--mask", "absent.png"], "no picture at absent.png"),
        (["complete", "red.png", "--prompt", "红心", "--mask", "text.png"], "text.png: not a picture"),
        (
            ["complete", "red.png", "--prompt", "红心", "--mask", "m.png", "--extend", "top:0.5"],
            "one of --keep, --mask",
        ),
        (["generate", "红心", "-n", "3", "--candidates", "2"], "candidates 2"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tiny_model_dir: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.png").write_text("a text")
    Path("empty.png").write_bytes(b"")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 16, 32, 32))
    mask.save("bottom.png")
    assert with_model(tiny_model_dir, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not Path("mmwudao-out").exists()
