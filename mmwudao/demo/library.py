"""The collection that the demo searches, with its pictures and those that visitors add."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from PIL import Image

from data.atomic import write_files
from data.sample import DataError
from data.styles import guess_language
from mmwudao.pictures import encode_png
from retrieval.collections.building import build_collection, open_source
from retrieval.collections.opening import Collection, Hit, Item, open_collection
from retrieval.collections.query import embed_query, hit_samples
from retrieval.collections.where import sql_text
from retrieval.towers.base import Towers
from retrieval.vectors.parquet import caption_column
from vqvae.storage.parts import content_hash

SAMPLES = Path(__file__).parents[2] / "data" / "samples" / "emoji"
OWN = "own"  # the family of pictures that visitors add
ADDED_ID = re.compile(rf"{OWN}-[0-9a-f]{{16}}")
FAMILY_SAMPLE = 2000  # items whose families are offered as filters
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

    def __init__(self, collection: Collection, towers: Towers, added: Path, shards: str | None = None) -> None:
        """`shards`: where the pictures are now, if not where they were embedded."""
        self._collection, self._towers, self._added, self._shards = collection, towers, added, shards
        self._writing = threading.Lock()
        ids = list(islice(chain.from_iterable(ids for ids, _ in collection.scan()), FAMILY_SAMPLE))
        families = {str(item.metadata["family"]) for item in collection.get(ids) if "family" in item.metadata}
        self.families = sorted(families - {OWN})

    def count(self) -> int:
        return self._collection.count()

    def search(self, query: str | Image.Image, k: int, family: str = "", where: str = "") -> list[SearchResult]:
        """The `k` items most similar to a text or a picture, of that family ("": of any) and allowed by `where`."""
        conditions = [f"family = {sql_text(family)}"] if family else []
        conditions += [f"({where})"] if where.strip() else []
        hits = self._collection.search(embed_query(self._towers, query), k, " AND ".join(conditions) or None)
        samples = hit_samples(hits, self._shards)
        results = []
        for hit in hits:
            sample = samples.get(hit.id)
            picture = sample.require_image() if sample else self._added_picture(hit)
            extension = sample.extension if sample else "png"
            results.append(SearchResult(hit.id, hit.score, hit.metadata, picture, extension))
        return results

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
