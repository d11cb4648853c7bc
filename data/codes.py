"""Shards of image codes: what `mmwudao tokenize` writes and the generator trains on."""

from __future__ import annotations

import io
import tarfile
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy
from numpy.lib import format as array_files
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from data.archives import is_of_macos
from data.sample import DataError, Sample
from data.shards import read_manifest


@dataclass
class CodedSample:
    """The codes of a picture, uint16 or int32 [h, w], and its sample, which is stored without the picture.

    `views` [K, h, w] are the codes of other views of it (`data.augment`), if they were made.
    """

    sample: Sample
    codes: NDArray[numpy.integer]
    views: NDArray[numpy.integer] | None = None

    def to_members(self) -> dict[str, bytes]:
        views = {} if self.views is None else {"views.npy": _npy_bytes(self.views)}
        return {"npy": _npy_bytes(self.codes), **views, "json": self.sample.to_members()["json"]}


def read_codes(folder: Path, split: str) -> Iterator[CodedSample]:
    """Every coded sample of a split, in order. Raises `DataError` for a damaged shard or another format."""
    manifest = read_manifest(folder)
    if "tokenizer" not in manifest.sources:
        raise DataError(f"{folder} holds pictures, not codes; run `mmwudao tokenize` on it first")
    if split not in manifest.splits:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(manifest.splits)}")
    for shard in manifest.splits[split]:
        path, count = Path(folder) / shard.file, 0
        try:
            with tarfile.open(path, "r:") as tar:  # not compressed, so that errors speak of tar alone
                for coded in _read_shard(tar):
                    count += 1
                    yield coded
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"{path} is damaged or missing: {error}") from error
        if count != shard.samples:  # `tarfile` takes a cut inside a header for the end
            raise DataError(f"{path} is damaged: it holds {count} samples, not the {shard.samples} of the manifest")


def _npy_bytes(codes: NDArray[numpy.integer]) -> bytes:
    buffer = io.BytesIO()
    numpy.save(buffer, codes, allow_pickle=False)
    return buffer.getvalue()


def tokenizer_hash(folder: Path) -> str:
    """The content hash of the image tokenizer that made these codes."""
    return str(read_manifest(folder).sources.get("tokenizer", ""))


def _read_shard(tar: tarfile.TarFile) -> Iterator[CodedSample]:
    files = (entry for entry in tar if entry.isreg() and not is_of_macos(entry.name))
    for key, entries in groupby(files, lambda entry: base_plus_ext(entry.name)[0]):
        if key is None:  # no extension: of no sample
            continue
        members: dict[str, bytes] = {}
        for entry in entries:
            file = tar.extractfile(entry)
            assert file is not None, entry.name
            members[base_plus_ext(entry.name)[1]] = file.read()
        if lacking := {"json", "npy"} - members.keys():  # ours are written together
            raise DataError(f"sample {key} has no .{min(lacking)}: make the codes again with `mmwudao tokenize`")
        sample = Sample.from_members(key, {"json": members["json"]})
        found = [members[name] for name in ("npy", "views.npy") if name in members]
        yield CodedSample(sample, *(read_array(content, f"sample {key}: its .npy") for content in found))


def read_array(content: bytes, name: str) -> NDArray[numpy.integer]:
    """The array in the bytes of a .npy file. Raises `DataError`, which begins with `name`, for anything else."""
    try:  # not numpy.load, which opens an archive of arrays too, and gives something else
        codes: NDArray[numpy.integer] = array_files.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, OverflowError, MemoryError, tokenize.TokenError) as error:
        raise DataError(f"{name} is no array of codes ({' '.join(str(error).split())[:200]})") from error
    return codes
