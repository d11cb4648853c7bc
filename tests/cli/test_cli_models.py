"""`info`, `assemble`, `tokenize`, `data` and `train` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mmwudao.cli.app import run
from tests.helpers.cli import one_error


def test_info(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(tiny_model_dir)]) == 0
    text = capsys.readouterr().out
    assert run(["info", str(tiny_model_dir), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert "32 x 32 pixels" in text
    for part in record["parts"].values():
        assert part["hash"] in text
    assert record["styles"] == ["noto", "twemoji"]


def test_assemble(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made"
    (tmp_path / "card.md").write_text("# A card\n")
    parts = ["--tokenizer", "tokenizer", "--generator", "generator", "--text", "text.model"]
    paths = [str(tiny_model_dir / part) if not part.startswith("--") else part for part in parts]
    options = ["--name", "made", "--image-size", "32", "--styles", "noto, twemoji", "--card", str(tmp_path / "card.md")]
    assert run(["assemble", *paths, *options, "-o", str(out), "--guidance", "2.5"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert (out / "README.md").read_text() == "# A card\n"
    assert run(["info", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["styles"] == ["noto", "twemoji"]
    assert record["default_sampling"]["guidance"] == 2.5
    assert run(["assemble", *paths, *options, "-o", str(out)]) == 2
    assert "not empty" in one_error(capsys)


def test_tokenize_pictures_and_codes(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (50, 41), (200, 30, 30)).save(tmp_path / "red.png")
    out = tmp_path / "out"
    base = ["tokenize", "--model", str(tiny_model_dir), "-o", str(out)]
    assert run([*base, str(tmp_path / "red.png")]) == 0
    text = capsys.readouterr().out
    assert "[5, 6] codes" in text
    assert "PSNR" in text
    with Image.open(out / "red-decoded.png") as decoded:
        assert decoded.size == (48, 40)
    # from the codes alone, and with a tokenizer's own folder
    again = ["tokenize", "--model", str(tiny_model_dir / "tokenizer"), "-o", str(out), str(out / "red.npy")]
    assert run(again) == 0
    assert (out / "red-decoded-2.png").read_bytes() == (out / "red-decoded.png").read_bytes()


def test_tokenize_bad_input(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.npy").write_text("no codes")
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    (tmp_path / "folder").mkdir()
    out = tmp_path / "out"
    for sources, message in (
        (["good.png", "text.png"], "text.png"),
        (["good.png", "text.npy"], "no array of codes"),
        (["good.png", "absent.png"], "absent.png"),
        (["folder"], "no folder of shards"),
        (["folder", "good.png"], "one folder of shards at a time"),
    ):
        paths = [str(tmp_path / source) for source in sources]
        assert run(["tokenize", "--model", str(tiny_model_dir), "-o", str(out), *paths]) == 2
        assert message in one_error(capsys)
        assert not out.exists()


def test_pack_stats_and_tokenize_shards(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    for k in range(6):
        Image.new("RGB", (40 + k, 40), (40 * k, 100, 50)).save(source / f"{k}.png")
        (source / f"{k}.txt").write_text(f"picture {k}")
    (source / "broken.png").write_text("no picture")
    (source / "broken.txt").write_text("nothing")
    shards, codes = str(tmp_path / "shards"), str(tmp_path / "codes")
    assert run(["data", "pack", str(source), "-o", shards, "--size", "32", "--language", "en"]) == 0
    assert "train: 6 samples in 1 shards\nskipped: 1\n" in capsys.readouterr().out
    assert run(["data", "stats", shards, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert run(["data", "stats", shards]) == 0
    assert "6" in capsys.readouterr().out
    assert run(["tokenize", shards, "--model", str(tiny_model_dir), "-o", codes, "--device", "cpu"]) == 0
    assert "train: 6 samples" in capsys.readouterr().out
    workers = "workers must be a whole number of at least 1"
    for options, problem in ((["--workers", "0"], workers), (["--size", "34"], "a multiple of 8: not 34")):
        bad = ["tokenize", shards, "--model", str(tiny_model_dir), "-o", f"{codes}-bad", "--device", "cpu", *options]
        assert run(bad) == 2
        assert problem in one_error(capsys)
        assert not (tmp_path / "codes-bad").exists()
    assert run(["data", "stats", str(tmp_path / "absent")]) == 2
    assert "absent" in one_error(capsys)


@pytest.mark.parametrize("part", ["tokenizer", "generator"])
def test_training_names_a_bad_setting(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("loop: {steps: 10}\n")
    assert run(["train", part, str(config), "loop.stepz=3"]) == 2
    assert "loop.stepz" in one_error(capsys)
    assert run(["train", part, str(config), "loop.steps=many"]) == 2
    assert "loop.steps" in one_error(capsys)
    assert run(["train", part, str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml" in one_error(capsys)
