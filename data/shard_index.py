"""Samples of plain tar shards by number, in an order that a seed decides: what step reads which needs no memory of it.

Beside each shard stands its index, `train-00000.tar.index`, which is made once: a line of JSON that says what shard it
is of, and one for each sample with the places of its members. The order is another in every epoch: shards are shuffled,
and so are the samples of as many shards as make a window, so that reading stays near one place.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import logging
import os
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy
from webdataset.tariterators import base_plus_ext

from data.archives import is_of_macos
from data.atomic import write_file
from data.images import MAX_PIXELS, ImageTooLarge, open_image
from data.reading import (
    BROKEN_SHARD,
    CORRUPT_IMAGE,
    DAMAGE,
    DOUBLED_MEMBER,
    MAX_FAILURES,
    MISSING_CAPTION,
    TOO_LARGE,
    Example,
    Skip,
    SkipLog,
    shard_stem,
)
from data.records import parse_json
from data.sample import IMAGE_EXTENSIONS, DataError, DoubledMember, Sample

logger = logging.getLogger(__name__)

FORMAT = "mmwudao-index/1"
SUFFIX = ".index"
SAMPLED = 1 << 16  # bytes at either end of a shard that its digest is of: all of a large one would take too long


class IndexedSample(NamedTuple):
    """A sample: its key, and of each member the extension, the place of its first byte, and its size."""

    key: str
    members: list[tuple[str, int, int]]


class ShuffledShards:
    """The usable samples of plain tar shards in the order of `seed`, by place; the same for every process.

    `shuffle` is the least number of samples in a window; 0 keeps the order of the shards. With `captions` these
    are read, and samples without one are not usable. Raises `DataError` for compressed shards, and without samples.
    """

    def __init__(
        self, shards: Sequence[Path], *, shuffle: int = 0, seed: int = 0, captions: bool = True,
        exclude_families: Sequence[str] = (), log: SkipLog | None = None,
    ) -> None:  # fmt: skip
        if compressed := [shard for shard in shards if not is_plain(shard)]:
            raise DataError(f"{compressed[0]} is compressed: unpack it (gunzip), as samples are read one by one")
        self.shards = list(shards)
        self.shuffle, self.seed, self.captions = shuffle, seed, captions
        self.exclude_families = set(exclude_families)
        self.log = log if log is not None else SkipLog()
        self.counts = tuple(open_index(shard, self.log) for shard in self.shards)
        self.entries = functools.lru_cache(maxsize=64)(self._entries)
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)
        self._descriptors: dict[int, int] = {}
        if not sum(self.counts):
            raise DataError(f"no readable sample in {len(self.shards)} shards, such as {self.shards[0]}")

    def __len__(self) -> int:
        return sum(self.counts)

    def at(self, position: int) -> Example:
        """The example at `position`, counted from the start of the training over all epochs.

        Where that sample cannot be used, the next that can takes its place. Raises `DataError` when none can.
        """
        for further in range(min(MAX_FAILURES, len(self))):
            epoch, place = divmod(position + further, len(self))
            shard, number = self.locate(epoch, place)
            sample = self.sample(shard, number)
            if sample is None:
                continue
            try:
                image = open_image(sample.require_image(), MAX_PIXELS)
            except DataError as error:
                reason = TOO_LARGE if isinstance(error, ImageTooLarge) else CORRUPT_IMAGE
                self.log.take(Skip(reason, f"{self.shards[shard].name}: sample {sample.id}", error))
                continue
            return Example(sample, image)
        raise DataError(f"{further + 1} samples in a row cannot be used; the last was in {self.shards[shard]}")

    def locate(self, epoch: int, place: int) -> tuple[int, int]:
        """The shard, and the number in it, of what stands at `place` in an epoch."""
        order, starts, ends = self._order(epoch)
        window = bisect.bisect_right(ends, place)
        first = ends[window - 1] if window else 0
        if self.shuffle:
            place = first + int(_window_order(ends[window] - first, self.seed, epoch, window)[place - first])
        turn = bisect.bisect_right(starts, place) - 1
        return order[turn], place - starts[turn]

    def sample(self, shard: int, number: int) -> Sample | None:
        """A sample of a shard, its picture still encoded; None for one that cannot be used."""
        entry = self.entries(shard)[number]
        name = f"{self.shards[shard].name}: sample {entry.key}"
        try:
            if len({extension for extension, *_ in entry.members}) < len(entry.members):
                raise DoubledMember(f"sample {entry.key}: one of its members is twice in the shard: leave one out")
            sample = Sample.from_members(entry.key, self.members(shard, number), self.captions)
            if self.captions:
                sample.require_captions()
        except DataError as error:
            reason = DOUBLED_MEMBER if isinstance(error, DoubledMember) else MISSING_CAPTION
            self.log.take(Skip(reason, name, error))
            return None
        return None if sample.family in self.exclude_families else sample

    def members(self, shard: int, number: int) -> dict[str, bytes]:
        """The members of a sample as they are, by extension. They lie behind one another: one request."""
        entry = self.entries(shard)[number]
        if shard not in self._descriptors:
            if len(self._descriptors) >= 64:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[shard] = os.open(self.shards[shard], os.O_RDONLY)
        start = min(place for _, place, _ in entry.members)
        end = max(place + size for _, place, size in entry.members)
        content = os.pread(self._descriptors[shard], end - start, start)
        return {extension: content[place - start : place - start + size] for extension, place, size in entry.members}

    def _entries(self, shard: int) -> list[IndexedSample]:
        path = index_path(self.shards[shard])
        if not path.is_file():  # it could not be written
            return scan_shard(self.shards[shard])[0]
        with suppress(ValueError, TypeError):
            lines = path.read_text(encoding="utf-8").splitlines()[1:]
            found = [
                IndexedSample(key, [(name, first, size) for name, first, size in members])
                for key, members in map(parse_json, lines)
            ]
            if len(found) == self.counts[shard]:
                return found
        return scan_shard(self.shards[shard])[0]  # only its first line is as we wrote it

    def _epoch_order(self, epoch: int) -> tuple[list[int], list[int], list[int]]:
        """The order of the shards in an epoch, the place at which each begins, and where each window of them ends."""
        order = list(range(len(self.counts)))
        if self.shuffle:
            order = numpy.random.default_rng([self.seed, epoch]).permutation(len(order)).tolist()
        starts = [0, *itertools.accumulate(self.counts[shard] for shard in order)]
        ends: list[int] = []
        for start in starts[1:]:
            if start - (ends[-1] if ends else 0) >= max(1, self.shuffle):
                ends.append(start)
        if not ends or ends[-1] < starts[-1]:  # what is left is too little for a window of its own
            ends[-1:] = [starts[-1]]
        return order, starts, ends


def is_plain(shard: Path) -> bool:
    """Whether a shard is a tar file that is not compressed."""
    return shard.name.lower() == f"{shard_stem(shard)}.tar".lower()


def index_path(shard: Path) -> Path:
    """Where the index of a shard stands."""
    return shard.with_name(shard.name + SUFFIX)


def open_index(shard: Path, log: SkipLog) -> int:
    """The number of samples of a shard; its index is made if there is none, or one of another shard.

    Where it cannot be written, as on a read-only disk, a warning says so.
    """
    state = {"format": FORMAT, "bytes": shard.stat().st_size, "digest": _digest(shard)}
    path = index_path(shard)
    with suppress(OSError, ValueError, TypeError, KeyError), path.open(encoding="utf-8") as file:
        head = parse_json(file.readline())
        if {name: head[name] for name in state} == state and type(head["samples"]) is int:
            if head["problem"]:
                log.add(BROKEN_SHARD, str(shard), head["problem"])
            return int(head["samples"])
    entries, problem = scan_shard(shard)
    head = {**state, "samples": len(entries), "problem": problem}
    lines = [json.dumps(head), *(json.dumps(entry) for entry in entries)]
    try:
        write_file(path, ("\n".join(lines) + "\n").encode())
    except OSError as error:
        logger.warning("cannot write %s (%s): the shard is looked through again whenever it is needed", path, error)
    if problem:
        log.add(BROKEN_SHARD, str(shard), problem)
    return len(entries)


def scan_shard(shard: Path) -> tuple[list[IndexedSample], str | None]:
    """The samples of a shard that have a picture, in its order, and what is wrong with it, if anything is."""
    found: list[IndexedSample] = []
    size = shard.stat().st_size
    problem = None
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                key, extension = base_plus_ext(entry.name)
                if key is None or is_of_macos(entry.name) or not entry.isreg() or entry.sparse is not None:
                    continue
                if entry.offset_data + entry.size > size:
                    problem = f"the archive breaks off in {entry.name}"
                    break
                if not found or found[-1].key != key:
                    found.append(IndexedSample(key, []))
                found[-1].members.append((extension.lower(), entry.offset_data, entry.size))
    except DAMAGE as error:
        problem = str(error)
    return [entry for entry in found if any(name in IMAGE_EXTENSIONS for name, *_ in entry.members)], problem


def _digest(shard: Path) -> str:
    with shard.open("rb") as file:
        head = file.read(SAMPLED)
        file.seek(max(0, shard.stat().st_size - SAMPLED))
        return sha256(head + file.read(SAMPLED)).hexdigest()


@functools.lru_cache(maxsize=4)
def _window_order(count: int, seed: int, epoch: int, window: int) -> numpy.ndarray:
    return numpy.random.default_rng([seed, epoch, window + 1]).permutation(count)
