"""The pictures of hits: files of a folder, or samples of shards."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from data.photos.reading import open_photo
from data.sample import DataError
from retrieval.collections.base import CollectionError, Hit
from retrieval.photos.places import PhotoPlace


def open_hits(place: PhotoPlace, hits: Sequence[Hit], side: int) -> list[Image.Image | None]:
    """The picture of each hit, of at most twice `side` pixels a side; None for a file that is gone or broken."""
    pictures: list[Image.Image | None] = []
    for hit in hits:
        try:
            picture = open_photo(place.photo(hit), side)
        except (DataError, CollectionError, OSError):  # changed since it was indexed, or not of this folder
            pictures.append(None)
            continue
        picture.thumbnail((2 * side, 2 * side))
        pictures.append(picture)
    return pictures
