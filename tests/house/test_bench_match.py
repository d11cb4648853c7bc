"""bench/quality/one_model.py runs at tiny size, and tells what it promises."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.quality import one_model
from data.sample import Question
from data.shards import Manifest, ShardWriter, write_manifest
from mmwudao.cli.app import run
from tests.helpers.tiny_towers import COLOURS, colour_sample

SPLITS = ("train", "test-family", "test-concept", "test")


@pytest.fixture(scope="module")
def work(matching_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of plain colours with a question each, and their codes."""
    folder, written = tmp_path_factory.mktemp("bench"), {}
    for split in SPLITS:
        with ShardWriter(folder / "shards", split, len(COLOURS)) as writer:
            for name in COLOURS:
                asked = (Question("en", "what colour?", name),)
                writer.write(replace(colour_sample(name, "noto"), id=f"{split}-{name}", questions=asked))
        written[split] = writer.shards
    write_manifest(folder / "shards", Manifest("colours", 16, written, {}))
    tokenizer = str(matching_model_dir / "tokenizer")
    command = ["tokenize", str(folder / "shards"), "-o", str(folder / "codes"), "--model", tokenizer, "--size", "32"]
    assert run([*command, "--device", "cpu"]) == 0
    return folder


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return record


def test_all_that_one_model_does(work, matching_model_dir, tiny_model_dir, monkeypatch, capsys):
    codes = ["--codes", str(work / "codes"), "--shards", str(work / "shards")]
    others = ["--questions", str(work / "codes"), "--answering", str(tiny_model_dir)]
    monkeypatch.setattr("sys.argv", ["one_model.py", "--model", str(matching_model_dir), *codes, *others])
    one_model.main()
    record = last_line(capsys)
    own = record["one model"]
    for split in SPLITS[1:3]:
        assert own[f"{split} bits a code"] > 0
        assert 0 <= own[f"{split} recall text to image"] <= 1
        assert f"{split} recall image to text, chance" in own
    assert "questions answered" not in own
    assert record["one that answers"] == {"questions answered": 0}  # random weights
    assert record["sizes"]["one model"].endswith(" MB")
