"""The collection that the demo searches, with its pictures and those that visitors add."""

from __future__ import annotations

import hashlib
import io
import random
import re
import threading
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy
from PIL import Image

from data.atomic import write_files
from data.sample import DataError
from data.styles import guess_language
from mmwudao.pictures import encode_png
from retrieval.collections.building import build_collection, open_source
from retrieval.collections.opening import Collection, Hit, Item, open_collection
from retrieval.collections.query import embed_query, hit_samples
from retrieval.collections.terms import Query
from retrieval.collections.where import all_of, sql_text
from retrieval.photos.places import PhotoPlace
from retrieval.photos.showing import open_hits
from retrieval.towers.base import Towers
from retrieval.vectors.parquet import CAPTION_PREFIX, caption_column
from vqvae.storage.parts import content_hash

SAMPLES = Path(__file__).parents[2] / "data" / "samples" / "emoji"
OWN = "own"  # the family of pictures that visitors add
ADDED_ID = re.compile(rf"{OWN}-[0-9a-f]{{16}}")
FAMILY_SAMPLE = 2000  # items whose families are offered as filters
MAX_PHOTO_SIDE = 640  # px: of pictures of a folder, copies of at most twice as many are shown
SHUFFLED = 256  # items whose captions and pictures are compared with each other's
FEWEST_SHUFFLED = 12  # fewer say little about chance
MAX_ADDED_SIDE = 1024  # px, of an added picture as it is stored


@dataclass(frozen=True)
class SearchResult:
    """A hit with its encoded picture, which is None if it is not on this machine."""

    id: str
    score: float
    metadata: dict[str, Any]
    picture: bytes | None
    extension: str


def sample_collection(towers: Towers, folder: Path) -> Collection:
    """A new collection of the sample pictures, in `folder`. Raises `DataError` if they are not installed."""
    if not SAMPLES.is_dir():
        raise DataError("the sample pictures are not installed: give --collection")
    with open_source([str(SAMPLES)], lambda: towers) as vectors:
        build_collection(vectors, folder / "collection")
    return given_collection(towers, str(folder / "collection"))


def given_collection(towers: Towers, location: str) -> Collection:
    """The collection at `location`. Raises `CollectionError`, also if it holds vectors of other towers."""
    return open_collection(location, dim=towers.embed_dim, model=content_hash(towers))


class Library:
    """A collection and its towers. Pictures that visitors add are files in the folder `added`."""

    def __init__(
        self,
        collection: Collection,
        towers: Towers,
        added: Path,
        shards: str | None = None,
        place: PhotoPlace | None = None,
    ) -> None:
        """`shards`: where the pictures are now, if not where they were embedded; `place`: the folder they are in."""
        self._collection, self._towers, self._added, self._shards = collection, towers, added, shards
        self._place = place
        self._writing, self._measuring = threading.Lock(), threading.Lock()
        self._chance: dict[str, tuple[float, float] | None] = {}
        ids = list(islice(chain.from_iterable(ids for ids, _ in collection.scan()), FAMILY_SAMPLE))
        families = {str(item.metadata["family"]) for item in collection.get(ids) if "family" in item.metadata}
        self.families = sorted(families - {OWN})

    @property
    def can_add(self) -> bool:
        """Whether visitors may add pictures: a collection that follows a folder would drop them again."""
        return self._place is None

    def count(self) -> int:
        return self._collection.count()

    def search(self, query: str | Image.Image | Query, k: int, family: str = "", where: str = "") -> list[SearchResult]:
        """The `k` items most similar to texts or pictures, of that family ("": of any) and allowed by `where`."""
        conditions = [f"family = {sql_text(family)}"] if family else []
        conditions += [where] if where.strip() else []
        hits = self._collection.search(embed_query(self._towers, query), k, all_of(conditions))
        samples = hit_samples(hits, self._shards)
        if self._place is not None:
            return [
                _photo_result(hit, picture)
                for hit, picture in zip(hits, open_hits(self._place, hits, MAX_PHOTO_SIDE), strict=True)
            ]
        results = []
        for hit in hits:
            sample = samples.get(hit.id)
            picture = sample.require_image() if sample else self._added_picture(hit)
            extension = sample.extension if sample else "png"
            results.append(SearchResult(hit.id, hit.score, hit.metadata, picture, extension))
        return results

    def near_from(self, query: str | Image.Image | Query) -> float | None:
        """The score from which a hit of such a query tells something; None if that cannot be said of this collection.

        It is what the best of as many unrelated items reaches by chance: of the scores of queries with items that are
        not theirs (captions, or pictures, shuffled among `SHUFFLED` items), the mean and as many standard deviations
        as the largest of `count` normal numbers lies above it. Measured once for texts and once for pictures.
        """
        pictures = isinstance(query, Image.Image) or (
            isinstance(query, Query) and not any(isinstance(term.content, str) for term in query.terms)
        )
        kind = "image" if pictures else "text"
        with self._measuring:
            if kind not in self._chance:
                self._chance[kind] = self._measure_chance(kind)
        chance = self._chance[kind]
        if chance is None:
            return None
        mean, deviation = chance
        return mean + deviation * NormalDist().inv_cdf(1 - 1 / max(2, self.count()))

    def _measure_chance(self, kind: str) -> tuple[float, float] | None:
        """Mean and standard deviation of the scores of unrelated queries and items; None for too few items."""
        ids = list(islice(chain.from_iterable(self._collection.ids()), FAMILY_SAMPLE))
        random.Random(0).shuffle(ids)
        items = self._collection.get(ids[:SHUFFLED])
        vectors = numpy.array([item.vector for item in items])
        if kind == "text":
            texts = [caption for item in items if (caption := _caption(item.metadata))]
            own = [row for row, item in enumerate(items) if _caption(item.metadata)]
            queries = self._towers.encode_text(texts).numpy() if texts else numpy.empty((0, 0))
        else:
            queries, own = vectors, list(range(len(items)))
        if len(own) < FEWEST_SHUFFLED:
            return None
        scores = queries @ vectors.T
        scores[numpy.arange(len(own)), own] = numpy.nan  # an item is no stranger to its own caption
        return float(numpy.nanmean(scores)), float(numpy.nanstd(scores))

    def add(self, image: Image.Image, description: str) -> int:
        """Store a picture, replacing the same one if it is stored already. Returns the new number of items."""
        image = image.copy()
        image.thumbnail((MAX_ADDED_SIDE, MAX_ADDED_SIDE), Image.Resampling.LANCZOS)
        encoded = encode_png(image)
        name = f"{OWN}-{hashlib.sha256(encoded).hexdigest()[:16]}"
        metadata: dict[str, Any] = {"kind": "image", "family": OWN}
        if description.strip():
            metadata[caption_column(guess_language(description))] = description.strip()
        vector = embed_query(self._towers, image)
        self._added.mkdir(parents=True, exist_ok=True)
        with self._writing:
            write_files({self._added / f"{name}.png": encoded})
            self._collection.upsert([Item(name, vector, metadata)])
        return self.count()

    def close(self) -> None:
        self._collection.close()

    def _added_picture(self, hit: Hit) -> bytes | None:
        path = self._added / f"{hit.id}.png"
        return path.read_bytes() if ADDED_ID.fullmatch(hit.id) and path.is_file() else None


def _photo_result(hit: Hit, picture: Image.Image | None) -> SearchResult:
    """A hit with a copy of its picture without the file's EXIF data, which may tell where it was taken."""
    encoded = None
    if picture is not None:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90, exif=b"")
        encoded = buffer.getvalue()
    return SearchResult(hit.id, hit.score, hit.metadata, encoded, "jpg")


def _caption(metadata: dict[str, Any]) -> str:
    """The first caption of an item, or ""."""
    names = sorted(name for name in metadata if name == "text" or name.startswith(CAPTION_PREFIX))
    return str(metadata[names[0]]) if names else ""
