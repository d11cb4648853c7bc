"""What the demo searches: a collection, its pictures, and those that visitors add."""

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
from data.reading import expand_shards
from data.sample import DataError
from data.styles import guess_language
from mmwudao.loading.stored_pictures import stored_samples
from mmwudao.pictures import encode_png
from retrieval.collections.opening import Collection, Hit, Item, open_collection
from retrieval.collections.where import sql_text
from retrieval.towers.base import Towers
from retrieval.vectors.embed import embed_shards
from retrieval.vectors.parquet import open_vectors, read_vectors
from vqvae.storage.parts import content_hash

SAMPLES = Path(__file__).parents[2] / "data" / "samples" / "emoji"
OWN = "own"  # the family of added pictures
ADDED_ID = re.compile(rf"{OWN}-[0-9a-f]{{16}}")
LOOKED_AT = 2000  # items whose families are listed
MAX_ADDED_SIDE = 1024  # px, of an added picture as it is kept


@dataclass(frozen=True)
class Found:
    """A hit with its encoded picture, if that is on this machine."""

    id: str
    score: float
    metadata: dict[str, Any]
    picture: bytes | None
    extension: str


def sample_collection(towers: Towers, folder: Path) -> Collection:
    """A new collection of the sample pictures, in `folder`. Raises `DataError` where they are not installed."""
    if not SAMPLES.is_dir():
        raise DataError("the sample pictures are not installed: give --collection")
    shards = {shard.stem: shard for shard in expand_shards(SAMPLES)}
    embed_shards(towers, SAMPLES, folder / "vectors", progress=False)
    vectors = open_vectors(folder / "vectors", shards)
    collection = open_collection(folder / "collection", create=True, dim=vectors.dim, model=vectors.model)
    for items in read_vectors(vectors):
        collection.add(items)
    return collection


def given_collection(towers: Towers, place: str) -> Collection:
    """The collection at `place`. Raises `CollectionError`, also when it holds vectors of other towers."""
    return open_collection(place, dim=towers.embed_dim, model=content_hash(towers))


class Library:
    """A collection and its towers. Added pictures are files in the folder `added`."""

    def __init__(self, collection: Collection, towers: Towers, added: Path, shards: str | None = None) -> None:
        """`shards`: where the pictures lie, if not where they were read from."""
        self._collection, self._towers, self._added, self._shards = collection, towers, added, shards
        self._writing = threading.Lock()
        ids = list(islice(chain.from_iterable(ids for ids, _ in collection.scan()), LOOKED_AT))
        families = {str(item.metadata["family"]) for item in collection.get(ids) if "family" in item.metadata}
        self.families = sorted(families - {OWN})

    def count(self) -> int:
        return self._collection.count()

    def search(self, query: str | Image.Image, k: int, family: str = "", where: str = "") -> list[Found]:
        """The `k` items nearest to a text or a picture, of that family (""; any) and for which `where` is true."""
        if isinstance(query, str):
            vector = self._towers.encode_text([query])[0].numpy()
        else:
            vector = self._towers.encode_image([query])[0].numpy()
        conditions = [f"family = {sql_text(family)}"] if family else []
        conditions += [f"({where})"] if where.strip() else []
        hits = self._collection.search(vector, k, " AND ".join(conditions) or None)
        stored = stored_samples(hits, self._shards)
        found = []
        for hit in hits:
            sample = stored.get(hit.id)
            picture = sample.require_image() if sample else self._added_picture(hit)
            extension = sample.extension if sample else "png"
            found.append(Found(hit.id, hit.score, hit.metadata, picture, extension))
        return found

    def add(self, image: Image.Image, description: str) -> int:
        """Store a picture; the same one again replaces it. Returns how many items there are now."""
        image = image.copy()
        image.thumbnail((MAX_ADDED_SIDE, MAX_ADDED_SIDE), Image.Resampling.LANCZOS)
        encoded = encode_png(image)
        name = f"{OWN}-{hashlib.sha256(encoded).hexdigest()[:16]}"
        metadata: dict[str, Any] = {"kind": "image", "family": OWN}
        if description.strip():
            metadata[f"caption_{guess_language(description)}"] = description.strip()
        vector = self._towers.encode_image([image])[0].numpy()
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
