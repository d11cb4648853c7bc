"""What the first pass of `data clean` found out, kept shard by shard until the run is done: the next run goes on there.

It lies in `OUT/unfinished` with the settings it was made with, and goes when the cleaned shards take its place.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.atomic import check_unused, write_file
from data.records import parse_json
from data.sample import Caption

FOLDER, SETTINGS = "unfinished", "settings.json"
_OURS = re.compile(r"settings\.json|judged-[0-9a-f]{16}\.json|\.[0-9a-f]{32}\.tmp")
Key = tuple[str, str]  # shard or text file, sample


@dataclass
class Judged:
    """What the first pass found: samples that go, captions that changed, and what pairs are compared by.

    `told` is what the skip log has of it: reason, name, problem.
    """

    gone: set[Key] = field(default_factory=set)
    captions: dict[Key, dict[str, Caption]] = field(default_factory=dict)
    keys: list[Key] = field(default_factory=list)
    ranks: list[tuple[bool, str]] = field(default_factory=list)
    prints: list[tuple[int, NDArray[np.uint8] | None]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    scores: list[tuple[Key, str, float]] = field(default_factory=list)
    told: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, other: Judged) -> None:
        """Take what was found in another shard."""
        self.gone |= other.gone
        self.captions |= other.captions
        self.keys += other.keys
        self.ranks += other.ranks
        self.prints += other.prints
        self.texts += other.texts
        self.scores += other.scores
        self.told += other.told


class UnfinishedRun:
    """The shards that a run into `out` has judged with these `settings`. Raises `DataError` where `out` is in use."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.folder = out / FOLDER
        if not self._is_there():
            check_unused(out)
        self._settings = json.dumps(settings, sort_keys=True, default=str).encode()
        stored = None
        with suppress(OSError):
            stored = (self.folder / SETTINGS).read_bytes()
        if stored != self._settings:  # of other settings, killed at its very start, or not there
            self.remove()

    def _is_there(self) -> bool:
        """Whether `out` holds an unfinished run and nothing else."""
        names = [path.name for path in self.folder.glob("*")]
        return [path.name for path in self.folder.parent.glob("*")] == [FOLDER] and all(map(_OURS.fullmatch, names))

    def read(self, shard: Path) -> Judged | None:
        """What was found in a shard; None if it was not judged, or has changed since."""
        try:
            record = parse_json(self._place(shard).read_bytes())
            if record["shard"] != _state(shard):
                return None
            return _judged(str(shard), record)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # damaged: it is judged again
            return None

    def write(self, shard: Path, judged: Judged) -> None:
        """Keep what was found in a shard."""
        if not (self.folder / SETTINGS).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.folder / SETTINGS, self._settings)
        record = {"shard": _state(shard), **_record(judged)}
        write_file(self._place(shard), json.dumps(record).encode())

    def remove(self) -> None:
        """Leave nothing: neither what was found, nor a folder that holds nothing else."""
        if self._is_there():
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):
                self.folder.parent.rmdir()

    def _place(self, shard: Path) -> Path:
        digest = hashlib.sha256(str(shard.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return self.folder / f"judged-{digest}.json"


def _state(shard: Path) -> list[int]:
    found = shard.stat()
    return [found.st_size, found.st_mtime_ns]


def _record(judged: Judged) -> dict[str, Any]:
    """What JSON can hold; keys without their shard."""
    return {
        "gone": sorted(sample for _, sample in judged.gone),
        "captions": [
            (sample, language, caption.name, caption.keywords, caption.others)
            for (_, sample), captions in judged.captions.items()
            for language, caption in captions.items()
        ],
        "without": [sample for (_, sample), captions in judged.captions.items() if not captions],
        "keys": [sample for _, sample in judged.keys],
        "ranks": judged.ranks,
        "prints": [
            (bits, None if small is None else base64.b64encode(small.tobytes()).decode())
            for bits, small in judged.prints
        ],
        "texts": judged.texts,
        "scores": [(sample, language, score) for (_, sample), language, score in judged.scores],
        "told": judged.told,
    }


def _judged(shard: str, record: dict[str, Any]) -> Judged:
    captions: dict[Key, dict[str, Caption]] = {(shard, sample): {} for sample in record["without"]}
    for sample, language, name, keywords, others in record["captions"]:
        captions.setdefault((shard, sample), {})[language] = Caption(name, tuple(keywords), tuple(others))
    return Judged(
        gone={(shard, sample) for sample in record["gone"]},
        captions=captions,
        keys=[(shard, sample) for sample in record["keys"]],
        ranks=[(train, digest) for train, digest in record["ranks"]],
        prints=[
            (bits, None if small is None else np.frombuffer(base64.b64decode(small), np.uint8))
            for bits, small in record["prints"]
        ],
        texts=[(language, text) for language, text in record["texts"]],
        scores=[((shard, sample), language, score) for sample, language, score in record["scores"]],
        told=[(reason, name, problem) for reason, name, problem in record["told"]],
    )
