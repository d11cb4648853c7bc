"""Which pictures of a test split have a near copy in training, so that its figures can be read for what they are."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.fingerprints import Named, near_pairs, read_fingerprints
from data.images import open_image
from data.reading import ShardSpec, SkipLog, expand_shards, read_shard
from data.sample import DataError
from data.settings import NearSettings

ImageEmbedder = Callable[[list[Image.Image]], NDArray[np.float32]]  # RGB pictures -> unit vectors [N, width]
_BATCH = 64


@dataclass(frozen=True)
class Leak:
    """A picture of a test split and the nearest training picture among its near copies."""

    test: Named
    train: Named
    distance: int  # differing bits of the pHash
    colour: float  # mean difference in [0, 1]
    cosine: float | None = None  # of an embedder's vectors


@dataclass
class LeakReport:
    """Counts of test pictures, by split and family, and the leaks, the nearest first."""

    settings: NearSettings
    train: int
    pictures: dict[str, dict[str, int]] = field(default_factory=dict)  # split -> family -> pictures
    leaks: list[Leak] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)


def find_leaks(
    shards: ShardSpec, settings: NearSettings | None = None, embed: ImageEmbedder | None = None
) -> LeakReport:
    """Compare every picture outside the split `train` with all of it. `embed` adds the cosine of each pair.

    Raises `DataError` when there is no shard, no training picture or no other one.
    """
    settings, log = settings or NearSettings(), SkipLog()
    everything = read_fingerprints(shards, log)
    where = np.array([name.split == "train" for name in everything.names], bool)
    train, tests = everything[np.flatnonzero(where)], everything[np.flatnonzero(~where)]
    if not train.names or not tests.names:
        missing = "other" if train.names else "training"
        raise DataError(f"there is no {missing} picture in these shards; a leak lies between train and another split")
    report = LeakReport(settings, len(train.names), _counts(tests.names), skipped=log.counts)
    nearest: dict[int, Leak] = {}
    for query, other, distance, colour in near_pairs(tests, train, settings):
        leak = Leak(tests.names[query], train.names[other], distance, colour)
        if query not in nearest or (distance, colour) < (nearest[query].distance, nearest[query].colour):
            nearest[query] = leak
    report.leaks = sorted(nearest.values(), key=lambda leak: (leak.distance, leak.colour, leak.test.id))
    if embed is not None:
        report.leaks = _with_cosine(report.leaks, embed)
    return report


def format_leaks(report: LeakReport, examples: int = 12) -> str:
    """A table for people: how many test pictures of each split and family have a near copy, and the nearest pairs."""
    lines = [
        f"near copies: at most {report.settings.distance} of 64 bits of the pHash differ, and the colours by "
        f"{report.settings.colour:g} on average; {report.train:,} training pictures"
    ]
    for split, families in report.pictures.items():
        leaks = [leak for leak in report.leaks if leak.test.split == split]
        total = sum(families.values())
        lines += ["", f"{split}: {len(leaks):,} of {total:,} pictures have one ({len(leaks) / total:.1%})"]
        distances = Counter(leak.distance for leak in leaks)
        lines.append("  differing bits: " + (_listed(sorted(distances.items())) or "none"))
        found = Counter(leak.test.family for leak in leaks)
        lines += [f"  {family:<22}{found[family]:>6} of {count:,}" for family, count in families.items()]
        pairs = Counter(f"{leak.test.family} in {leak.train.family}" for leak in leaks)
        lines.append("  most often: " + (_listed(pairs.most_common(6)) or "none"))
    if report.leaks:
        lines += ["", "the nearest:"]
    for leak in report.leaks[:examples]:
        cosine = "" if leak.cosine is None else f", cosine {leak.cosine:.3f}"
        lines.append(
            f"  {leak.test.id} ({leak.test.split}) ~ {leak.train.id}: {leak.distance} bits, colour "
            f"{leak.colour:.3f}{cosine}"
        )
    if report.skipped:
        lines += ["", f"skipped: {_listed(report.skipped.items())}"]
    return "\n".join(lines)


def _counts(names: Sequence[Named]) -> dict[str, dict[str, int]]:
    """split -> family -> pictures, the largest first."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name in names:
        counts[name.split][name.family] += 1
    return {split: dict(counts[split].most_common()) for split in sorted(counts)}


def _with_cosine(leaks: list[Leak], embed: ImageEmbedder) -> list[Leak]:
    wanted = {(name.shard, name.id) for leak in leaks for name in (leak.test, leak.train)}
    vectors: dict[tuple[str, str], NDArray[np.float32]] = {}
    batch: list[tuple[tuple[str, str], Image.Image]] = []

    def flush() -> None:
        if batch:
            made = embed([image for _, image in batch])
            vectors.update(zip((key for key, _ in batch), made, strict=True))
            batch.clear()

    for shard in sorted({shard for shard, _ in wanted}):
        for path in expand_shards(shard):
            for sample in read_shard(path, lambda *skip: None):  # told when the fingerprints were made
                if (shard, sample.id) in wanted:
                    batch.append(((shard, sample.id), open_image(sample.require_image())))
                if len(batch) == _BATCH:
                    flush()
    flush()
    return [
        Leak(
            leak.test,
            leak.train,
            leak.distance,
            leak.colour,
            float(vectors[leak.test.shard, leak.test.id] @ vectors[leak.train.shard, leak.train.id]),
        )
        for leak in leaks
    ]


def _listed(counts: object) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts)  # type: ignore[attr-defined]
