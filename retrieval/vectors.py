"""The Parquet parts that `retrieval.embed` writes, read back as items of a collection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy

from data.sample import DataError
from retrieval.embed import FORMAT, SETTINGS
from retrieval.index import Item

Kind = Literal["image", "text", "all"]
ROWS_AT_ONCE = 8192
TEXT_COLUMNS = ("kind", "language", "text", "family", "concept", "base_concept", "licence", "source")


@dataclass(frozen=True)
class Vectors:
    """A folder of parts: the content hash of the towers that made them, the dimension, the shards they were made of."""

    folder: Path
    model: str
    dim: int
    shards: dict[str, Path]  # a part's stem -> the shard, by name alone where its folder is not known


def is_vectors(folder: Path) -> bool:
    """Whether `embed` has written here."""
    return (folder / SETTINGS).is_file()


def open_vectors(folder: Path, shards: dict[str, Path] | None = None) -> Vectors:
    """A folder that `embed` has finished. Raises `DataError` when it is another, or parts are missing."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / SETTINGS} is missing or not JSON: give a folder that `embed` wrote") from error
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise DataError(f"{folder} holds no vectors of the format {FORMAT}: embed the shards again")
    missing = [name for name in settings["shards"] if not _part(folder, name).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {len(missing)} parts ({missing[0]}, ...): run `mmwudao embed` to its end")
    places = {Path(name).stem: Path(name) for name in settings["shards"]}
    return Vectors(folder, settings["towers"], settings["embed_dim"], shards or places)


def read_vectors(vectors: Vectors, kind: Kind = "image") -> Iterator[list[Item]]:
    """The rows of that kind, up to `ROWS_AT_ONCE` at a time.

    A picture has the id of its sample and its captions as `caption_LANGUAGE`; a caption has the id
    `SAMPLE:LANGUAGE`. Both have what else the part tells, and `shard`: where the picture lies.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind not in get_args(Kind):
        raise DataError(f"the kind is one of {', '.join(get_args(Kind))}, not {kind!r}")
    for stem, shard in vectors.shards.items():
        part = _part(vectors.folder, stem)
        try:
            for batch in pq.ParquetFile(part).iter_batches(ROWS_AT_ONCE):
                columns = {name: batch[name].to_pylist() for name in (*TEXT_COLUMNS, "id", "captions")}
                flat = batch["vector"].flatten().to_numpy(zero_copy_only=False)
                rows = flat.astype(numpy.float32).reshape(len(batch), vectors.dim)
                items = [
                    _item({name: column[k] for name, column in columns.items()}, rows[k], shard)
                    for k in range(len(batch))
                    if kind in ("all", columns["kind"][k])
                ]
                if items:
                    yield items
        except (OSError, KeyError, pa.ArrowInvalid) as error:  # what PyArrow raises for a damaged file
            raise DataError(f"{part} is damaged: delete it and run `mmwudao embed` again ({error})") from error


def _part(folder: Path, shard: str) -> Path:
    return folder / f"{Path(shard).stem}.parquet"


def _item(row: dict[str, Any], vector: numpy.ndarray, shard: Path) -> Item:
    metadata = {name: row[name] for name in TEXT_COLUMNS if row[name] is not None}
    for language, caption in row["captions"] or []:
        metadata[f"caption_{''.join(c if c.isascii() and c.isalnum() else '_' for c in language)}"] = caption
    name = row["id"] if row["kind"] == "image" else f"{row['id']}:{row['language']}"
    return Item(name, vector, metadata | {"shard": str(shard)})
