"""The pictures of what a search found, read from the shards they came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data.reading import expand_shards, read_shard
from data.sample import Sample
from retrieval.collections.opening import Hit


def stored_samples(hits: Sequence[Hit], shards: str | None = None) -> dict[str, Sample]:
    """The sample of each hit by the hit's id, from `shards` or from where it was read; what is not there is left out.

    Raises `DataError` for `shards` that do not exist.
    """
    given = {shard.name: shard for shard in expand_shards(shards)} if shards else {}
    wanted: dict[Path, set[str]] = {}
    for hit in hits:
        place = Path(str(hit.metadata.get("shard", "")))
        shard = given.get(place.name, place)
        if shard.is_file():
            wanted.setdefault(shard, set()).add(_sample_id(hit))
    samples = {
        sample.id: sample
        for shard, names in wanted.items()
        for sample in read_shard(shard, lambda *_: None)  # what is damaged is left out
        if sample.id in names
    }
    return {hit.id: samples[_sample_id(hit)] for hit in hits if _sample_id(hit) in samples}


def _sample_id(hit: Hit) -> str:
    """A caption's item names its sample before the language."""
    return hit.id.rpartition(":")[0] if hit.metadata.get("kind") == "text" else hit.id
