"""Tar archives: the places of what a plain one holds, and what is wrong with a file that is none."""

from __future__ import annotations

import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext

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
_PLAIN_TEXT = bytes([*range(32, 127), *b"\t\r\n"])
# what webdataset skips
_METADATA = re.compile(r"__[^/]*__($|/)")


class PlainSample(NamedTuple):
    """A sample of a plain tar file: its key, and of each extension the place of the first byte and the size."""

    key: str
    members: dict[str, tuple[int, int]]


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
    named = next((f"no tar file but {what}" for magic, what in _OTHER_FORMATS if start.startswith(magic)), None)
    if named is None and start and not start.translate(None, _PLAIN_TEXT) and not _begins_as_tar(shard):
        return f"no tar file but text ({start.decode()!r} ...): give the shards themselves"
    return named


def _begins_as_tar(shard: Path) -> bool:
    try:
        return next(_headers(shard), None) is not None
    except ValueError:
        return False


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
    try:
        for _ in _headers(shard):
            pass
    except ValueError:
        return False
    return True


def is_of_macos(name: str) -> bool:
    """Whether a member is one of the hidden files that macOS adds: `._a.png` beside a.png, and .DS_Store."""
    last = name.rpartition("/")[2]
    return last.startswith("._") or last == ".DS_Store"


def lacks_extension(name: str) -> bool:
    """Whether a member has no extension, which says what it is of its sample."""
    last = name.rpartition("/")[2]
    return last != "" and "." not in last and not _METADATA.match(name)


def plain_samples(shard: Path, left_out: list[str]) -> list[PlainSample] | None:
    """The samples of a tar file as webdataset groups them, by the places of their members; None to let it look.

    The names of members that are of no sample are added to `left_out`.

    Only a file that is whole, not compressed, and of plain files and folders is read here. What is anything else, or
    a problem, is left to webdataset: links, long names, one name twice, an end without zeros.
    """
    found: list[PlainSample] = []
    try:
        for header, start, size in _headers(shard):
            kind, name = header[156:157], _name(header)
            if kind == b"5":
                continue
            if kind not in (b"0", b"\0") or name.endswith("/"):
                return None
            key, extension = base_plus_ext(name)
            if key is None or is_of_macos(name) or _METADATA.match(name):
                left_out += [name] * lacks_extension(name)
                continue
            if not found or found[-1].key != key:
                found.append(PlainSample(key, {}))
            members, extension = found[-1].members, extension.lower()
            if extension in members or extension.startswith("__"):
                return None
            members[extension] = (start, size)
    except (OSError, ValueError):
        return None
    return found


def read_plain(shard: Path, samples: Sequence[PlainSample]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The key and the members of each sample, extension -> bytes. Raises `OSError` if the file became shorter."""
    with shard.open("rb") as file:
        for key, places in samples:
            first = min(start for start, _ in places.values())
            end = max(start + size for start, size in places.values())
            file.seek(first)
            content = file.read(end - first)  # members lie behind one another
            if len(content) < end - first:
                raise OSError("unexpected end of data")
            yield key, {name: content[start - first : start - first + size] for name, (start, size) in places.items()}


def _headers(shard: Path) -> Iterator[tuple[bytes, int, int]]:
    """Each header of a plain tar file, and the place and size of what follows it.

    Raises `ValueError` where a block is no header, and for an end without a block of zeros.
    """
    with shard.open("rb") as file:
        while len(header := file.read(tarfile.BLOCKSIZE)) == tarfile.BLOCKSIZE:
            if not any(header):
                return
            size, stored = (int(field.rstrip(b"\0 "), 8) for field in (header[124:136], header[148:156]))
            if size < 0 or sum(header) - sum(header[148:156]) + 8 * ord(" ") != stored:  # its own field is spaces
                raise ValueError("no header")
            start = file.tell()
            yield header, start, size
            file.seek(start - (-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
    raise ValueError("no block of zeros")


def _name(header: bytes) -> str:
    """The name in a header. Raises `ValueError` for one that is not UTF-8, and of a format with other fields."""
    magic, prefix = header[257:265], header[345:500].partition(b"\0")[0]
    if magic == b"ustar  \0" and not any(header[345:500]):  # GNU's, with times in the place of a prefix
        prefix = b""
    elif magic != b"ustar\x0000":
        raise ValueError("another format")
    name = header[:100].partition(b"\0")[0]
    return (prefix + b"/" + name if prefix else name).decode()
