"""Deterministic webdataset shards and the manifest beside them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from data.atomic import write_file
from data.records import parse_json
from data.sample import DataError, Sample

MANIFEST_FORMAT = "mmwudao-shards/1"
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class ShardInfo:
    """One tar file: its name in the folder, how many samples and bytes it holds, its SHA-256 (hex)."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass
class Manifest:
    """What a folder of shards holds. `skipped` counts the samples left out, by reason."""

    name: str
    image_size: int | None
    splits: dict[str, list[ShardInfo]]
    sources: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def samples(self, split: str) -> int:
        return sum(shard.samples for shard in self.splits[split])


MAX_NAME_BYTES = 90  # a tar header holds 100 bytes of name, extension included


class ShardWriter:
    """Writes samples to `{split}-00000.tar`, ... of `samples_per_shard` samples each.

    The bytes depend on the samples and their order alone: no times, owners or host data are stored.
    """

    def __init__(self, folder: Path, split: str, samples_per_shard: int = 2000) -> None:
        if samples_per_shard < 1:
            raise DataError(f"samples per shard must be at least 1, not {samples_per_shard}")
        self.folder, self.split, self.samples_per_shard = Path(folder), split, samples_per_shard
        self.shards: list[ShardInfo] = []
        self._tar: tarfile.TarFile | None = None
        self._count = 0
        self._last = ""  # name of a sample: two in a row would be read as one

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._close()

    def write(self, sample: Sample) -> None:
        self.write_members(sample.id, sample.to_members())

    def write_members(self, key: str, members: dict[str, bytes]) -> None:
        """Write one sample as `key`.`extension` for each of `members`.

        A key that no member can have, or that the sample before has, gets a digest; its record has its id as it is.
        """
        if self._tar is None:
            self._tar = tarfile.open(self._path, "w", format=tarfile.USTAR_FORMAT, encoding="utf-8")
        name = key.replace(".", "_")  # webdataset splits a member's name at the first dot of its last part
        if name.startswith("__"):  # which it takes for its own
            name = f"x{name}"
        if name == self._last or name.endswith("/") or len(name.encode()) > MAX_NAME_BYTES:
            digest = hashlib.sha256(f"{key} {len(self.shards)} {self._count}".encode()).hexdigest()[:12]
            name = f"{name.encode()[: MAX_NAME_BYTES - 13].decode(errors='ignore').rstrip('/')}-{digest}"
        self._last = name
        for extension, content in sorted(members.items()):
            member = tarfile.TarInfo(f"{name}.{extension}")
            member.size, member.mode, member.mtime = len(content), 0o644, 0
            self._tar.addfile(member, io.BytesIO(content))
        self._count += 1
        if self._count == self.samples_per_shard:
            self._close()

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self.shards):05d}.tar"

    def _close(self) -> None:
        if self._tar is None:
            return
        path = self._path
        self._tar.close()
        self.shards.append(ShardInfo(path.name, self._count, path.stat().st_size, file_sha256(path)))
        self._tar, self._count = None, 0


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write `manifest.json` atomically; returns its path."""
    record = {
        "format": MANIFEST_FORMAT,
        "name": manifest.name,
        "image_size": manifest.image_size,
        "splits": {
            split: {"samples": manifest.samples(split), "shards": [asdict(shard) for shard in shards]}
            for split, shards in manifest.splits.items()
        },
        "sources": manifest.sources,
        "skipped": dict(sorted(manifest.skipped.items())),
    }
    path = Path(folder) / MANIFEST_NAME
    write_file(path, (json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode())
    return path


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`; `DataError` when it is missing, broken or of another format."""
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST_NAME}; build it with `mmwudao data build` or `mmwudao data pack`")
    try:
        record = parse_json(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != MANIFEST_FORMAT:
        raise DataError(f"{path} is not a {MANIFEST_FORMAT} manifest")
    try:
        return Manifest(
            name=record["name"],
            image_size=record["image_size"],
            splits={
                split: [ShardInfo(**shard) for shard in entry["shards"]] for split, entry in record["splits"].items()
            },
            sources=record.get("sources", {}),
            skipped=record.get("skipped", {}),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a complete manifest ({error})") from error
