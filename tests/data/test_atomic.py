"""Files and folders that appear only when they are whole: after errors, after kills, and synced before their name."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.atomic import check_unused, new_file, new_folder, write_file, write_files
from data.sample import DataError


def test_all_files_or_none(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"old")
    with pytest.raises(FileNotFoundError):
        write_files({tmp_path / "a": b"new", tmp_path / "no" / "b": b"new"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}
    write_files({tmp_path / "a": b"new", tmp_path / "b": b"too"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"new", "b": b"too"}


def test_a_file_is_kept_when_the_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "a"
    write_file(target, b"old")
    with pytest.raises(TypeError), new_file(target) as temporary:
        temporary.write_text(None)  # type: ignore[arg-type]  # opened, then fails
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert target.read_bytes() == b"old"


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(TypeError), new_folder(out) as building:
        (building / "x").write_text(None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    out.mkdir()  # empty: taken
    with new_folder(out) as building:
        (building / "sub").mkdir()
        (building / "sub" / "x").write_text("whole")
    assert (out / "sub" / "x").read_text() == "whole"
    assert out.stat().st_mode & 0o777 == 0o755
    with pytest.raises(DataError, match="not empty: choose another"), new_folder(out):
        pass
    with pytest.raises(DataError, match="not empty"):
        check_unused(out / "sub" / "x")
    assert (out / "sub" / "x").read_text() == "whole"
    with new_folder(out, replace=True) as building:
        (building / "y").write_text("other")
    assert [path.name for path in out.iterdir()] == ["y"]


KILLED = """
import os, signal, sys
from pathlib import Path
from data.atomic import new_folder
with new_folder(Path(sys.argv[1]), replace=True) as building:
    (building / "x").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="folders have no locks")
def test_what_a_killed_process_has_left_goes(tmp_path: Path) -> None:
    out = tmp_path / "o[u]t"  # no pattern of its own
    for kept in (".o[u]t-notes", "o[u]t.part-abcdefgh", ".out.part-abcdefgh"):
        (tmp_path / kept).mkdir()
    before = set(tmp_path.iterdir())
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    (left,) = set(tmp_path.iterdir()) - before
    assert (left / "x").read_text() == "half"
    with new_folder(out, replace=True) as building:
        assert not left.exists()
        with new_folder(out, replace=True):  # beside one that is still built
            pass
        (building / "y").write_text("whole")
    assert set(tmp_path.iterdir()) == before | {out}
    assert [path.name for path in out.iterdir()] == ["y"]


def test_what_stood_there_is_not_removed_before_its_successor_stands(tmp_path: Path) -> None:
    old = tmp_path / ".out.part-abcdefgh.old"  # killed between two renames
    old.mkdir()
    with pytest.raises(DataError), new_folder(tmp_path / "out"):
        raise DataError("stopped")
    assert old.exists()
    with new_folder(tmp_path / "out") as building:
        (building / "y").touch()
    with new_folder(tmp_path / "out", replace=True) as building:
        (building / "y").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_content_is_synced_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append("sync " + ("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"))
        real_sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        calls.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_file(tmp_path / "a", b"x")
    assert calls == ["sync file", "rename", "sync folder"]


WRITER = """
import sys
from pathlib import Path
from data.atomic import new_folder, write_file
root = Path(sys.argv[1])
for k in range(100_000):
    write_file(root / "file", bytes([k % 256]) * 20_000)
    with new_folder(root / "folder", replace=True) as building:
        for name in "abc":
            (building / name).write_bytes(bytes([k % 256]) * 5_000)
"""


def test_kills_leave_whole_files(tmp_path: Path) -> None:
    """What stands under its name after `kill -9` is never half of one and half of another."""
    pause = random.Random(0)
    seen = 0
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], cwd=Path(__file__).parents[2])
        deadline = time.monotonic() + 120
        while not (tmp_path / "file").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(pause.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = (tmp_path / "file").read_bytes()
        assert len(content) == 20_000
        assert len(set(content)) == 1
        folder = tmp_path / "folder"
        if folder.exists():  # a replaced folder is absent for a moment
            parts = {name: (folder / name).read_bytes() for name in "abc"}
            assert {len(part) for part in parts.values()} == {5_000}
            assert len({byte for part in parts.values() for byte in part}) == 1
            seen += 1
    assert seen
