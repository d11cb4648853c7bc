"""Shards of image codes: what `mmwudao tokenize` writes and the generator trains on."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy
from numpy.typing import NDArray

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
    for key, entries in groupby(tar, lambda entry: entry.name.partition(".")[0]):
        members: dict[str, bytes] = {}
        for entry in entries:
            file = tar.extractfile(entry)
            assert file is not None, entry.name
            members[entry.name.partition(".")[2]] = file.read()
        if members.keys() >= {"json", "npy"}:  # ours are written together
            sample = Sample.from_members(key, {"json": members["json"]})
            yield CodedSample(sample, *(_array(key, members[name]) for name in ("npy", "views.npy") if name in members))


def _array(key: str, content: bytes) -> NDArray[numpy.integer]:
    try:
        codes: NDArray[numpy.integer] = numpy.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"sample {key}: its .npy is no array of codes") from error
    return codes
