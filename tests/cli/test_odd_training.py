"""Trainings on damaged shards: what cannot be read is skipped by name, and nothing readable is one line."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mmwudao.cli.app import run
from tests.helpers.cli import one_error

BROKEN = {
    "empty.tar": b"",
    "zeros.tar": bytes(10_240),
    "zip.tar": b"PK\x03\x04" + bytes(600),
    "page.tar": b"<!DOCTYPE html>" + b" " * 600,
}


def shard(path: Path, count: int) -> bytes:
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            picture = io.BytesIO()
            Image.new("RGB", (32, 32), (10 * number, 0, 0)).save(picture, "PNG")
            for name, content in ((f"{number}.png", picture.getvalue()), (f"{number}.txt", b"a thing")):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path.read_bytes()


def train(folder: Path, in_memory: bool) -> int:
    config = {
        "data": {"shards": str(folder / "shards"), "image_size": 32, "test": "train", "in_memory": in_memory},
        "model": {"channels": [4, 4, 8], "residual_blocks": 1, "code_dim": 4, "codebook_size": 8},
        "loop": {"out": str(folder / "run"), "steps": 2, "batch_size": 2, "precision": "float32", "warmup": 0},
    }
    config["loop"] |= {"log_every": 1, "eval_every": 2, "save_every": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return run(["train", "tokenizer", str(folder / "config.yaml")])


@pytest.mark.parametrize("in_memory", [True, False])
def test_damaged_shards_beside_good_ones(tmp_path, caplog, in_memory):
    (tmp_path / "shards").mkdir()
    whole = shard(tmp_path / "shards" / "good.tar", 8)
    for name, content in {**BROKEN, "cut.tar": whole[: len(whole) // 2]}.items():
        (tmp_path / "shards" / name).write_bytes(content)
    assert train(tmp_path, in_memory) == 0
    assert (tmp_path / "run" / "tokenizer").is_dir()
    for name in ("empty.tar", "zip.tar", "page.tar", "cut.tar"):
        assert f"{name}: truncated or broken shard" in caplog.text


@pytest.mark.parametrize("in_memory", [True, False])
def test_nothing_but_damaged_shards_is_one_line(tmp_path, capsys, in_memory):
    (tmp_path / "shards").mkdir()
    for name, content in BROKEN.items():
        (tmp_path / "shards" / name).write_bytes(content)
    assert train(tmp_path, in_memory) == 2
    assert "shard" in one_error(capsys)
    assert not (tmp_path / "run" / "tokenizer").exists()
