"""The Parquet parts that `retrieval.vectors.embed` writes, read back as tables that a collection stores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from data.sample import DataError
from retrieval.vectors.embed import FORMAT, SETTINGS

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["image", "text", "all"]
ROWS_AT_ONCE = 100_000  # handed to a collection
READ_AT_ONCE = 8192
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


def read_vectors(vectors: Vectors, kind: Kind = "image", rows: int = ROWS_AT_ONCE) -> Iterator[pa.Table]:
    """The rows of that kind as tables that a collection stores, of about `rows` rows, the last of fewer.

    A picture has the id of its sample and its captions as `caption_LANGUAGE`; a caption has the id
    `SAMPLE:LANGUAGE`. Both have what else the part tells, and `shard`: where the picture lies.
    """
    import pyarrow as pa

    if kind not in get_args(Kind):
        raise DataError(f"the kind is one of {', '.join(get_args(Kind))}, not {kind!r}")
    waiting: list[pa.Table] = []
    for table in _read_parts(vectors, kind):
        waiting.append(table)
        if sum(map(len, waiting)) >= rows:
            yield pa.concat_tables(waiting, promote_options="default")
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting, promote_options="default")


def _read_parts(vectors: Vectors, kind: Kind) -> Iterator[pa.Table]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    for stem, shard in vectors.shards.items():
        part = _part(vectors.folder, stem)
        try:
            with pq.ParquetFile(part) as file:
                for batch in file.iter_batches(READ_AT_ONCE):
                    chosen = batch if kind == "all" else batch.filter(pc.equal(batch["kind"], kind))
                    if len(chosen):
                        yield _items(chosen, shard)
        except (OSError, KeyError, pa.ArrowInvalid) as error:  # what PyArrow raises for a damaged file
            raise DataError(f"{part} is damaged: delete it and run `mmwudao embed` again ({error})") from error


def _part(folder: Path, shard: str) -> Path:
    return folder / f"{Path(shard).stem}.parquet"


def _items(rows: pa.RecordBatch, shard: Path) -> pa.Table:
    """Rows of a part as items of a collection."""
    import pyarrow as pa
    import pyarrow.compute as pc

    captioned = pc.binary_join_element_wise(rows["id"], rows["language"], ":")
    columns = {"id": pc.if_else(pc.equal(rows["kind"], "image"), rows["id"], captioned), "vector": rows["vector"]}
    columns |= {name: rows[name] for name in TEXT_COLUMNS}
    captions = rows["captions"]
    for language in captions.keys.unique().to_pylist():
        name = f"caption_{''.join(c if c.isascii() and c.isalnum() else '_' for c in language)}"
        columns[name] = pc.map_lookup(captions, language, "first")
    return pa.table(columns | {"shard": pa.repeat(str(shard), len(rows))})
