"""What shards hold: counts, languages, sizes and duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from data.images import ImageTooLarge, read_header
from data.reading import CORRUPT_IMAGE, TOO_LARGE, ShardSpec, SkipLog, expand_shards, read_shard, split_name
from data.sample import DataError


@dataclass
class CaptionStats:
    """The captions of one language. Lengths in characters, of the name; `keywords` is the mean number of them."""

    samples: int = 0
    distinct: int = 0
    shortest: int = 0
    mean: float = 0.0
    longest: int = 0
    keywords: float = 0.0


@dataclass
class ShardStats:
    """Counts of samples, except for `shards`, `bytes` (of the tar files) and `image_bytes` (of the pictures)."""

    shards: int = 0
    samples: int = 0
    uncaptioned: int = 0
    bytes: int = 0
    image_bytes: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    languages: dict[str, CaptionStats] = field(default_factory=dict)
    families: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # "WIDTHxHEIGHT" in pixels
    formats: dict[str, int] = field(default_factory=dict)
    licences: dict[str, int] = field(default_factory=dict)
    duplicate_images: int = 0  # beyond the first of each, bytes compared by SHA-256
    duplicate_images_across_splits: int = 0  # distinct pictures that lie in two splits or more
    duplicate_ids: int = 0  # beyond the first of each
    skipped: dict[str, int] = field(default_factory=dict)


def shard_stats(shards: ShardSpec, log: SkipLog | None = None) -> ShardStats:
    """Read every sample of `shards` (see `expand_shards`), of pictures the header alone. `log` takes the skips.

    Raises `DataError` when there is no shard.
    """
    log, stats = log if log is not None else SkipLog(), ShardStats()
    splits, families, sizes, formats, licences = (Counter[str]() for _ in range(5))
    ids: Counter[str] = Counter()
    lengths: dict[str, list[int]] = defaultdict(list)
    names: dict[str, set[str]] = defaultdict(set)
    keywords: Counter[str] = Counter()
    images: dict[bytes, set[str]] = defaultdict(set)  # digest -> splits

    def skip(reason: str, name: str, error: Exception) -> None:
        log.add(reason, name, str(error))

    for shard in expand_shards(shards):
        stats.shards += 1
        stats.bytes += shard.stat().st_size
        split = split_name(shard)
        for sample in read_shard(shard, skip, captions=False):
            image = sample.require_image()
            try:
                width, height, extension = read_header(image)
            except DataError as error:
                reason = TOO_LARGE if isinstance(error, ImageTooLarge) else CORRUPT_IMAGE
                skip(reason, f"{shard.name}: sample {sample.id}", error)
                continue
            stats.samples += 1
            stats.uncaptioned += not sample.captions
            stats.image_bytes += len(image)
            splits[split] += 1
            families[sample.family or "none"] += 1
            licences[sample.licence or "none"] += 1
            sizes[f"{width}x{height}"] += 1
            formats[extension] += 1
            ids[sample.id] += 1
            images[hashlib.sha256(image).digest()].add(split)
            for language, caption in sample.captions.items():
                lengths[language].append(len(caption.name))
                names[language].add(caption.name)
                keywords[language] += len(caption.keywords)
    stats.splits, stats.families, stats.licences = _ordered(splits), _ordered(families), _ordered(licences)
    stats.sizes, stats.formats = _ordered(sizes), _ordered(formats)
    stats.languages = {
        language: CaptionStats(
            samples=len(found),
            distinct=len(names[language]),
            shortest=min(found),
            mean=sum(found) / len(found),
            longest=max(found),
            keywords=keywords[language] / len(found),
        )
        for language, found in sorted(lengths.items(), key=lambda item: (-len(item[1]), item[0]))
    }
    stats.duplicate_images = stats.samples - len(images)
    stats.duplicate_images_across_splits = sum(len(where) > 1 for where in images.values())
    stats.duplicate_ids = stats.samples - len(ids)
    stats.skipped = log.counts
    return stats


def format_stats(stats: ShardStats, most: int = 12) -> str:
    """A table for people; of long lists the `most` frequent entries."""
    lines = [
        f"{'samples':<12}{stats.samples:,} in {stats.shards} shards ({_size(stats.bytes)})",
        f"{'no caption':<12}{stats.uncaptioned:,}",
        f"{'splits':<12}{_counts(stats.splits, most)}",
        f"{'pictures':<12}{_size(stats.image_bytes)}: {_counts(stats.formats, most)}",
        f"{'sizes':<12}{_counts(stats.sizes, most)}",
        f"{'families':<12}{_counts(stats.families, most)}",
        f"{'licences':<12}{_counts(stats.licences, most)}",
        f"{'duplicates':<12}{stats.duplicate_images:,} pictures ({stats.duplicate_images_across_splits:,} "
        f"of them across splits), {stats.duplicate_ids:,} ids",
        f"{'skipped':<12}{_counts(stats.skipped, most)}",
        "",
        f"{'language':<12}{'samples':>9}{'distinct':>10}{'characters':>17}{'keywords':>10}",
    ]
    for language, captions in stats.languages.items():
        characters = f"{captions.shortest}..{captions.mean:.1f}..{captions.longest}"
        lines.append(
            f"{language:<12}{captions.samples:>9,}{captions.distinct:>10,}{characters:>17}{captions.keywords:>10.1f}"
        )
    return "\n".join(lines)


def _ordered(counts: Counter[str]) -> dict[str, int]:
    """Most frequent first, then by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _counts(counts: dict[str, int], most: int) -> str:
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:most]]
    if len(counts) > most:
        shown.append(f"and {len(counts) - most} more")
    return ", ".join(shown) or "none"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
