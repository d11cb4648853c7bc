"""Files and folders that appear only when they are whole and on the disk.

A file is written beside its place under another name, synced, and renamed; then its folder is synced, so that the new
name also survives a loss of power. A folder is built and renamed in the same way.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from uuid import uuid4

from data.sample import DataError

_BUILDING = ".part-"  # in the name of a folder that is being built, behind a dot and the name it will get


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write all files or none: each is complete and synced under a temporary name before the first is renamed."""
    with contextlib.ExitStack() as stack:
        temporaries = {path: stack.enter_context(_temporary_file(path)) for path in files}
        for path, temporary in temporaries.items():
            temporary.write_bytes(files[path])
            _sync(temporary)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
        for folder in {path.parent for path in files}:
            _sync(folder)


def write_file(path: Path, content: bytes) -> None:
    """Write one file, which is then whole and on the disk, or leave what was there."""
    write_files({path: content})


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` for a library to write to; at the end of the block it takes the place of `path`.

    If the block raises, the temporary file is removed and `path` stays as it was.
    """
    with _temporary_file(path) as temporary:
        yield temporary
        replace_synced(temporary, path)


def replace_synced(temporary: Path, path: Path) -> None:
    """Let a finished file beside `path` take its place; both the bytes and the name are then on the disk."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


@contextlib.contextmanager
def new_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` to build in; at the end of the block it takes the place of `out`.

    If the block raises, what was built is removed and `out` stays as it was; what a killed process has left of it is
    removed by the next one. Without `replace`, raises `DataError` at once when `out` is in use (`check_unused`).
    """
    out = Path(out)
    if not replace:
        check_unused(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_lost(out)
    building, lock = _locked_folder(out)
    try:
        yield building
        building.chmod(0o755)  # mkdtemp's folders are private
        for path in [*building.rglob("*"), building]:
            _sync(path)
        if replace and out.exists():
            old = out.with_name(f"{building.name}.old")  # renamed, not removed: a kill must not leave a part of it
            out.rename(old)
            building.rename(out)
            shutil.rmtree(old)
        else:
            with contextlib.suppress(FileNotFoundError):
                out.rmdir()
            building.rename(out)
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _locked_folder(out: Path) -> tuple[Path, int | None]:
    """A new folder to build `out` in, and the lock on it, which ends with the process; None where there are none."""
    while True:
        building = Path(tempfile.mkdtemp(prefix=f".{out.name}{_BUILDING}", dir=out.parent))
        try:
            lock = _lock(building)
        except (BlockingIOError, FileNotFoundError):  # another process took it for one that was left
            continue
        if lock is None or building.exists():
            return building, lock
        os.close(lock)


def _remove_lost(out: Path) -> None:
    """Remove the folders in which processes that were killed had begun to build `out`."""
    for path in out.parent.glob(f".{glob.escape(out.name)}{_BUILDING}*"):
        if path.suffix == ".old" and not out.exists():
            continue  # what was there before: killed between two renames
        with contextlib.suppress(OSError):  # somebody builds in it, or has just removed it
            if (lock := _lock(path)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor with the only lock on a folder; None where folders cannot be locked, as on some networks' disks.

    Raises `BlockingIOError` where another process has it.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def check_unused(out: Path) -> None:
    """`DataError` if a folder cannot be made at `out`: a file is there, or a folder that is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not empty: choose another folder")


@contextlib.contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    # a name of its own: what a lost process still writes must not get into the file of another
    temporary = path.with_name(f".{uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders, and keeps their names in a journal
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
