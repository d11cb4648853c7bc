"""Shards of image codes: what `mmwudao tokenize` writes and the generator trains on."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
from numpy.typing import NDArray

from data.sample import DataError, Sample
from data.shards import read_manifest


@dataclass
class CodedSample:
    """The codes of a picture, uint16 or int32 [h, w], and its sample, which is stored without the picture."""

    sample: Sample
    codes: NDArray[numpy.integer]

    def to_members(self) -> dict[str, bytes]:
        buffer = io.BytesIO()
        numpy.save(buffer, self.codes, allow_pickle=False)
        return {"npy": buffer.getvalue(), "json": self.sample.to_members()["json"]}


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


def tokenizer_hash(folder: Path) -> str:
    """The content hash of the image tokenizer that made these codes."""
    return str(read_manifest(folder).sources.get("tokenizer", ""))


def _read_shard(tar: tarfile.TarFile) -> Iterator[CodedSample]:
    members: dict[str, bytes] = {}
    for entry in tar:
        file = tar.extractfile(entry)
        assert file is not None, entry.name
        key, _, extension = entry.name.partition(".")
        members[extension] = file.read()
        if members.keys() >= {"json", "npy"}:  # ours are written together
            try:
                codes = numpy.load(io.BytesIO(members["npy"]), allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise DataError(f"sample {key}: its .npy is no array of codes") from error
            yield CodedSample(Sample.from_members(key, {"json": members["json"]}), codes)
            members = {}
