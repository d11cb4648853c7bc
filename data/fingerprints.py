"""Pictures that are nearly the same: perceptual hashes (pHash, by imagehash) and small colour thumbnails.

A pHash is 64 signs of the low frequencies of the picture in grey (Zauner 2010, "Implementation and Benchmarking of
Perceptual Image Hash Functions"): it survives another size, encoding and tone, and knows no colour, which the thumbnail
adds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.images import open_image
from data.reading import CORRUPT_IMAGE, ShardSpec, SkipLog, expand_shards, read_shard, split_name
from data.sample import DataError, Sample
from data.settings import NearSettings

THUMBNAIL = 16  # px
_BLOCK = 256  # pictures compared with all others at a time


class Named(NamedTuple):
    """Which picture a fingerprint is of."""

    id: str
    split: str
    family: str
    shard: str


@dataclass
class Fingerprints:
    """pHashes and thumbnails of pictures, in the order of `names`."""

    names: list[Named] = field(default_factory=list)
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))  # [N]
    thumbnails: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, THUMBNAIL * THUMBNAIL * 3), np.uint8))

    def __getitem__(self, index: NDArray[np.intp]) -> Fingerprints:
        return Fingerprints([self.names[i] for i in index], self.hashes[index], self.thumbnails[index])


def fingerprint(image: Image.Image) -> tuple[int, NDArray[np.uint8]]:
    """The pHash as a number of 64 bits, and the thumbnail in RGB, flat."""
    import imagehash

    bits = imagehash.phash(image).hash.ravel()
    thumbnail = np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.uint8).ravel()
    return int("".join("1" if bit else "0" for bit in bits), 2), thumbnail


def read_fingerprints(shards: ShardSpec, log: SkipLog | None = None) -> Fingerprints:
    """The fingerprints of every picture of `shards`; what does not decode goes to `log`."""
    log = log if log is not None else SkipLog()
    names: list[Named] = []
    made: list[tuple[int, NDArray[np.uint8]]] = []
    for shard in expand_shards(shards):
        for sample in read_shard(shard, lambda *skip: log.add(skip[0], skip[1], str(skip[2]))):
            try:
                made.append(fingerprint(open_image(sample.require_image())))
            except DataError as error:
                log.add(CORRUPT_IMAGE, f"{shard.name}: sample {sample.id}", str(error))
                continue
            names.append(_named(sample, split_name(shard), str(shard)))
    return stacked(names, made)


def stacked(names: list[Named], made: Iterable[tuple[int, NDArray[np.uint8]]]) -> Fingerprints:
    """`Fingerprints` of what `fingerprint` made, one for each of `names`."""
    made = list(made)
    if not made:
        return Fingerprints()
    return Fingerprints(names, np.array([bits for bits, _ in made], np.uint64), np.stack([small for _, small in made]))


def near_pairs(
    queries: Fingerprints, others: Fingerprints, settings: NearSettings
) -> list[tuple[int, int, int, float]]:
    """(query, other, differing bits, mean colour difference in [0, 1]) of all near copies, by query."""
    found = []
    for start in range(0, len(queries.names), _BLOCK):
        block = queries.hashes[start : start + _BLOCK, None] ^ others.hashes[None, :]
        distance = np.bitwise_count(block)  # [block, others]
        for row, other in zip(*np.nonzero(distance <= settings.distance), strict=True):
            query = start + int(row)
            difference = queries.thumbnails[query].astype(np.int16) - others.thumbnails[other]
            colour = float(np.abs(difference).mean() / 255)
            if colour <= settings.colour:
                found.append((query, int(other), int(distance[row, other]), colour))
    return found


def _named(sample: Sample, split: str, shard: str) -> Named:
    return Named(sample.id, split, sample.family or "none", shard)
