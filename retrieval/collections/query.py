"""From texts and pictures to what a search finds: the query's vector, and the samples and captions of the hits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
from numpy.typing import NDArray
from PIL import Image

from data.images import open_image, to_square
from data.photos.reading import open_photo
from data.reading import expand_shards, read_shard, shard_stem
from data.sample import DataError, Sample
from retrieval.collections.base import Collection, CollectionError, Hit, check_identity
from retrieval.collections.terms import LEAST_LENGTH, Query, Term
from retrieval.towers.base import Towers
from retrieval.vectors.parquet import CAPTION_PREFIX
from vqvae.storage.parts import content_hash


def check_towers(collection: Collection, location: str, towers: Towers) -> None:
    """Raise `CollectionError` if the collection holds vectors of other towers."""
    check_identity(collection, location, towers.embed_dim, content_hash(towers))


def embed_query(towers: Towers, query: str | Image.Image | Query) -> NDArray[numpy.float32]:
    """The vector of a text, a picture, or a sum of several, float32 [D] of unit length.

    Raises `CollectionError` for terms that cancel out, and `DataError` for a file that is no picture.
    """
    terms = query.terms if isinstance(query, Query) else (Term(query),)
    if len(terms) == 1 and terms[0].weight > 0:
        return numpy.asarray(_embed_term(towers, terms[0]), numpy.float32)
    return combine([_embed_term(towers, term) for term in terms], [term.weight for term in terms])


def combine(vectors: Sequence[NDArray[numpy.floating]], weights: Sequence[float]) -> NDArray[numpy.float32]:
    """The weighted sum of vectors [D], each scaled to length 1, as float32 [D] of length 1.

    Raises `CollectionError` for a vector of length 0, and for a sum that is nothing.
    """
    rows = numpy.stack([numpy.asarray(vector, numpy.float64) for vector in vectors])
    lengths = numpy.linalg.norm(rows, axis=1, keepdims=True)
    if not (numpy.isfinite(lengths) & (lengths > 0)).all():
        raise CollectionError("a vector of a query must have a length above 0 that is finite")
    total = numpy.asarray(weights) @ (rows / lengths)
    length = numpy.linalg.norm(total)
    if length <= LEAST_LENGTH * numpy.abs(weights).max():
        raise CollectionError("the texts and pictures cancel out: nothing is left to look for")
    return (total / length).astype(numpy.float32)


def _embed_term(towers: Towers, term: Term) -> NDArray[numpy.floating]:
    if isinstance(term.content, numpy.ndarray):
        return term.content
    if isinstance(term.content, str):
        return towers.encode_text([term.content])[0].numpy()
    picture = term.content
    if isinstance(picture, Path):
        try:
            picture = open_photo(picture)
        except DataError as error:
            raise DataError(f"{term.content}: {error}") from error
    return towers.encode_image([picture])[0].numpy()


def hit_captions(hit: Hit) -> list[str]:
    """The text of a caption's item, or the captions of a picture's, in the order of their languages."""
    names = sorted(name for name in hit.metadata if name == "text" or name.startswith(CAPTION_PREFIX))
    return [str(hit.metadata[name]) for name in names]


def hit_samples(hits: Sequence[Hit], shards: str | None = None) -> dict[str, Sample]:
    """Hit id -> sample, read from `shards`, or from the shard that the hit names; missing samples are left out.

    Raises `DataError` if `shards` are given and do not exist.
    """
    given = {shard.name: shard for shard in expand_shards(shards)} if shards else {}
    wanted: dict[Path, set[str]] = {}
    for hit in hits:
        named = Path(str(hit.metadata.get("shard", "")))
        shard = given.get(named.name, named)
        if shard.is_file():
            wanted.setdefault(shard, set()).add(_sample_id(hit))
    samples: dict[str, Sample] = {}
    for shard, names in wanted.items():
        for sample in read_shard(shard, lambda *_: None, captions=False):  # damaged samples are left out
            # with the name of the shard before it, where several shards have samples of one id
            samples |= {name: sample for name in (sample.id, f"{shard_stem(shard)}/{sample.id}") if name in names}
    return {hit.id: samples[_sample_id(hit)] for hit in hits if _sample_id(hit) in samples}


def hit_pictures(hits: Sequence[Hit], side: int, shards: str | None = None) -> list[Image.Image]:
    """The picture of each hit as a square of `side` pixels; `shards` as in `hit_samples`.

    Raises `CollectionError` without hits, or if a picture is not in its shard.
    """
    if not hits:
        raise CollectionError("the search returned nothing: there are no pictures to show")
    samples = hit_samples(hits, shards)
    missing = [hit for hit in hits if hit.id not in samples]
    if missing:
        source = shards or missing[0].metadata.get("shard", "")
        raise CollectionError(f"the picture of {missing[0].id} is not in {source!r}: give --shards, where it was read")
    return [to_square(open_image(samples[hit.id].require_image()), side) for hit in hits]


def _sample_id(hit: Hit) -> str:
    """The sample of a hit; the id of a caption's item is that of its sample, a colon and the language."""
    return hit.id.rpartition(":")[0] if hit.metadata.get("kind") == "text" else hit.id
