"""What is wrong with a file that is read as a tar archive."""

from __future__ import annotations

import lzma
import os
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

# what reading a damaged tar file raises, compressed or not
DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)
# the first bytes of files that are given in the place of shards, and what to do with them
_OTHER_FORMATS = (
    (b"PK\x03\x04", "a zip file: unpack it, and pack its pictures with `mmwudao data pack`"),
    (b"PAR1", "a Parquet file, perhaps of captions and URLs: give the shards with the pictures"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it (`zstd -d`), or make it a .tar.gz"),
    (b"\x04\x22\x4d\x18", "compressed by lz4: unpack it (`lz4 -d`), or make it a .tar.gz"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it, and pack its pictures with `mmwudao data pack`"),
    (b"Rar!\x1a\x07", "a RAR archive: unpack it, and pack its pictures with `mmwudao data pack`"),
    (b"version https://git-lfs", "a pointer of Git LFS: fetch the file that it stands for (`git lfs pull`)"),
    (b"<!DOCTYPE html", "a web page: the download failed"),
    (b"<html", "a web page: the download failed"),
)


def archive_problem(shard: Path, problems: Sequence[Exception]) -> str | None:
    """What is wrong with a shard in whose reading `problems` came up, or None; that it is no tar file before others."""
    if not problems:
        return _early_end(shard)
    return _other_format(shard) or _message(problems[0])


def _other_format(shard: Path) -> str | None:
    try:
        with shard.open("rb") as file:
            start = file.read(32)
    except OSError:
        return None  # what reading it raised says why
    return next((f"no tar file but {what}" for magic, what in _OTHER_FORMATS if start.startswith(magic)), None)


def _message(error: Exception) -> str:
    # webdataset appends the stream to the arguments of an exception; the first is the message
    text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    return text.partition(" @ ")[0].partition(" in tar file")[0]


def _early_end(shard: Path) -> str | None:
    """What is wrong with an archive that `tarfile` reads without complaint, or None.

    `tarfile` takes a damaged header, or a file cut inside one, for the end; the true end is a block of zeros.
    """
    if _ends_in_zeros(shard):
        return None
    try:
        with tarfile.open(shard) as archive:
            archive.getmembers()  # reads the headers only
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE):
                return None
            return f"the archive breaks off at byte {archive.offset}"
    except DAMAGE as error:
        return str(error)


def _ends_in_zeros(shard: Path) -> bool:
    """Whether a plain tar file goes from header to header until a block of zeros; five times as fast as `tarfile`."""
    with shard.open("rb") as file:
        while len(header := file.read(tarfile.BLOCKSIZE)) == tarfile.BLOCKSIZE:
            if not any(header):
                return True
            try:
                size, stored = (int(field.rstrip(b"\0 "), 8) for field in (header[124:136], header[148:156]))
            except ValueError:
                return False
            if size < 0 or sum(header) - sum(header[148:156]) + 8 * ord(" ") != stored:  # its own field is spaces
                return False
            file.seek(-(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, os.SEEK_CUR)
    return False
