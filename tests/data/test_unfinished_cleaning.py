"""`data clean` that was stopped: the next run takes what was judged, and ends as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data.clean import run as clean_run
from data.clean.config import CleanConfig
from data.clean.run import clean_data
from data.clean.unfinished import Judged
from data.config import from_dict
from data.sample import Caption, DataError
from data.shards import ShardWriter
from tests.data.test_clean import OFF, picture

ROOT = Path(__file__).parents[2]
CONFIG = {**OFF, "privacy": {"on": True}, "near_pictures": {"on": True, "distance": 4, "colour": 0.03}}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three shards: a number that is personal in the second, and the same picture in the first and the last."""
    with ShardWriter(tmp_path / "in", "train", 2) as writer:
        for number in range(6):
            name = "call +1 650-253-0000 now" if number == 2 else f"thing {number}"
            captions = {"en": Caption(name), "de": Caption(f"Ding {number}", ("x",), ("y",))}
            writer.write(picture(f"p{number}", number % 5, captions))
    return tmp_path / "in"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def counted(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[str]:
    """The shards that are judged from now on; Ctrl-C comes in the one of that number."""
    judged: list[str] = []
    judge = clean_run._judge_shard

    def recorded(path: Path, *rest: object) -> Judged:
        if len(judged) == stop_at:
            raise KeyboardInterrupt
        judged.append(path.name)
        return judge(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(clean_run, "_judge_shard", recorded)
    return judged


def test_an_interrupted_run_goes_on(source, tmp_path, monkeypatch, caplog):
    config = from_dict(CleanConfig, CONFIG)
    whole = clean_data(source, tmp_path / "whole", config)
    assert whole.skipped == {"near copy of another picture": 1, "personal data": 1}
    with monkeypatch.context() as patch:
        counted(patch, stop_at=2)
        with pytest.raises(KeyboardInterrupt):
            clean_data(source, tmp_path / "out", config)
    assert [path.name for path in tmp_path.glob("out/*")] == ["unfinished"]
    with monkeypatch.context() as patch:
        judged = counted(patch)
        assert clean_data(source, tmp_path / "out", config) == whole
    assert judged == ["train-00002.tar"]
    assert "2 of 3 were judged by a run that did not end" in caplog.text
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    with pytest.raises(DataError, match="not empty"):
        clean_data(source, tmp_path / "out", config)


@pytest.mark.parametrize("change", ["settings", "shard", "damage"])
def test_what_has_changed_is_judged_again(change, source, tmp_path, monkeypatch):
    config = from_dict(CleanConfig, CONFIG)
    with monkeypatch.context() as patch:
        counted(patch, stop_at=2)
        with pytest.raises(KeyboardInterrupt):
            clean_data(source, tmp_path / "out", config)
    if change == "settings":
        config = from_dict(CleanConfig, {**CONFIG, "script": {"on": True}})
    elif change == "shard":
        os.utime(source / "train-00000.tar", ns=(0, 0))
    else:
        next((tmp_path / "out" / "unfinished").glob("judged-*")).write_bytes(b"[" * 100_000)
    judged = counted(monkeypatch)
    clean_data(source, tmp_path / "out", config)
    assert len(judged) == (3 if change == "settings" else 2)
    assert not (tmp_path / "out" / "unfinished").exists()


def test_a_run_that_fails_leaves_nothing_and_a_folder_of_somebody_else_stays(source, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(clean_run, "write_manifest", fail)
        with pytest.raises(OSError, match="No space"):
            clean_data(source, tmp_path / "out", from_dict(CleanConfig, CONFIG))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    theirs = tmp_path / "out" / "unfinished"
    theirs.mkdir(parents=True)
    (theirs / "novel.txt").write_text("It was")
    with pytest.raises(DataError, match="not empty"):
        clean_data(source, tmp_path / "out", from_dict(CleanConfig, CONFIG))
    assert (theirs / "novel.txt").read_text() == "It was"


KILLED = """
import os, signal, sys
import data.clean.run as run
from mmwudao.cli.app import run as command
run.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
command(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(source, tmp_path):
    settings = [f"--set={name}.on=false" for name in ("language", "script", "words", "near_pictures")]
    arguments = ["data", "clean", str(source), "-o", str(tmp_path / "out"), *settings]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".out.part-")]) == 1
    done = subprocess.run([sys.executable, "-m", "mmwudao", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 were judged by a run that did not end" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert not (tmp_path / "out" / "unfinished").exists()
