"""Reads the Parquet parts that `retrieval.vectors.embed` writes, as tables that a collection can store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.characters import whole_characters
from data.reading import shard_stem
from data.records import parse_json
from data.sample import DataError
from retrieval.vectors.embed import FORMAT, SETTINGS

if TYPE_CHECKING:
    import pyarrow as pa

KIND_NAMES = {"image": "pictures", "text": "captions", "all": "pictures or captions"}
ROWS_AT_ONCE = 100_000  # handed to a collection in one table
READ_AT_ONCE = 8192
CAPTION_PREFIX = "caption_"  # of metadata names
TEXT_COLUMNS = ("kind", "language", "text", "family", "concept", "base_concept", "licence", "source")


@dataclass(frozen=True)
class Vectors:
    """A folder of parts, with the content hash of the towers, the dimension and the shards they were made from."""

    folder: Path
    model: str
    dim: int
    shards: dict[str, Path]  # a part's stem -> the shard, which is a bare file name if its folder is unknown


def is_vectors(folder: Path) -> bool:
    """Whether `embed` has written to this folder."""
    return (folder / SETTINGS).is_file()


def open_vectors(folder: Path, shards: dict[str, Path] | None = None) -> Vectors:
    """Open a folder that `embed` has finished. Raises `DataError` for any other folder, or if parts are missing."""
    try:
        settings = parse_json((folder / SETTINGS).read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / SETTINGS} is missing or not JSON: give a folder that `embed` wrote") from error
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise DataError(f"{folder} holds no vectors of the format {FORMAT}: embed the shards again")
    names = {shard_stem(Path(name)): Path(name) for name in settings["shards"]}
    missing = [name for stem, name in names.items() if not _part(folder, stem).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {len(missing)} parts ({missing[0]}, ...): run `mmwudao embed` to its end")
    return Vectors(folder, settings["towers"], settings["embed_dim"], shards or names)


def read_vectors(vectors: Vectors, kind: str = "image", rows: int = ROWS_AT_ONCE) -> Iterator[pa.Table]:
    """The rows of that kind as tables that a collection can store, of about `rows` rows each.

    `kind` is "image" (pictures), "text" (captions) or "all".

    A picture has the id of its sample, and its captions as `caption_LANGUAGE`; a caption has the id
    `SAMPLE:LANGUAGE`. Where several shards hold samples of one id, as img2dataset's keys may begin anew in each, the
    name of the shard comes before it: `SHARD/SAMPLE`. Both have the other columns of the part, and `shard`, the tar
    file that holds the picture. Raises `DataError` for an unknown kind or a damaged part.
    """
    import pyarrow as pa

    check_kind(kind)
    buffer: list[pa.Table] = []
    for table in _read_parts(vectors, kind, _repeated_ids(vectors)):
        buffer.append(table)
        if sum(map(len, buffer)) >= rows:
            yield pa.concat_tables(buffer, promote_options="default")
            buffer = []
    if buffer:
        yield pa.concat_tables(buffer, promote_options="default")


def check_kind(kind: str) -> None:
    """Raise `DataError` for an unknown kind of rows."""
    if kind not in KIND_NAMES:
        raise DataError(f"the kind is one of {', '.join(KIND_NAMES)}, not {kind!r}")


def has_rows(vectors: Vectors, kind: str) -> bool:
    """Whether there are rows of that kind. Raises `DataError` for an unknown kind or a damaged part."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    check_kind(kind)
    for part in (_part(vectors.folder, stem) for stem in vectors.shards):
        with _damage_named(part):
            kinds = pq.read_table(part, columns=["kind"])["kind"]
            if len(kinds) if kind == "all" else pc.any(pc.equal(kinds, kind)).as_py():
                return True
    return False


def _read_parts(vectors: Vectors, kind: str, repeated: pa.Array) -> Iterator[pa.Table]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    for stem, shard in vectors.shards.items():
        part = _part(vectors.folder, stem)
        with _damage_named(part):
            with pq.ParquetFile(part) as file:
                for batch in file.iter_batches(READ_AT_ONCE):
                    chosen = batch if kind == "all" else batch.filter(pc.equal(batch["kind"], kind))
                    if len(chosen):
                        yield _items(chosen, shard, stem, repeated)


def _repeated_ids(vectors: Vectors) -> pa.Array:
    """The ids that samples of several shards have."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    parts: list[pa.Array] = []
    for part in (_part(vectors.folder, stem) for stem in vectors.shards):
        with _damage_named(part):
            parts.append(pc.unique(pq.read_table(part, columns=["id"])["id"]))
    counts = pc.value_counts(pa.chunked_array(parts, pa.string()))
    return counts.field("values").filter(pc.greater(counts.field("counts"), 1))


@contextmanager
def _damage_named(part: Path) -> Iterator[None]:
    """What PyArrow raises for a damaged file, as `DataError` that names it."""
    import pyarrow as pa

    try:
        yield
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise DataError(f"{part} is damaged: delete it and run `mmwudao embed` again ({error})") from error


def caption_column(language: str) -> str:
    """The metadata name of a picture's caption in `language`."""
    return CAPTION_PREFIX + "".join(c if c.isascii() and c.isalnum() else "_" for c in language)


def _part(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.parquet"


def _items(rows: pa.RecordBatch, shard: Path, stem: str, repeated: pa.Array) -> pa.Table:
    """Rows of a part as the items of a collection."""
    import pyarrow as pa
    import pyarrow.compute as pc

    samples = rows["id"]
    if len(repeated):
        prefixed = pc.binary_join_element_wise(whole_characters(stem), samples, "/")
        samples = pc.if_else(pc.is_in(samples, repeated), prefixed, samples)
    captioned = pc.binary_join_element_wise(samples, rows["language"], ":")
    columns = {"id": pc.if_else(pc.equal(rows["kind"], "image"), samples, captioned), "vector": rows["vector"]}
    columns |= {name: rows[name] for name in TEXT_COLUMNS}
    captions = rows["captions"]
    for language in captions.keys.unique().to_pylist():
        columns[caption_column(language)] = pc.map_lookup(captions, language, "first")
    return pa.table(columns | {"shard": pa.repeat(whole_characters(str(shard)), len(rows))})
