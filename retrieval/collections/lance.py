"""A collection as a LanceDB table: a folder with nothing to start, or a bucket that many searchers share.

A write is a new version of the table: its files are written first, then a manifest that names them appears at once. A
process that is killed at any moment leaves the version before. Writers of one folder take turns by a lock; a bucket
has no lock, and takes one writing process at a time (two that store the same id at the same time: one gets an error).
"""

from __future__ import annotations

import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lancedb
import numpy
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock, Timeout
from lancedb.index import BTree, HnswSq
from numpy.typing import NDArray

from retrieval.collections.base import Collection, CollectionError, Hit, IdsThere, Item, Value
from retrieval.collections.items import PYTHON_TYPES, RESERVED, check_ids, check_search, to_table, unit_vector
from retrieval.collections.where import parse_where, sql_text, to_sql

FORMAT = "mmwudao-collection/1"
TABLE = "items"
SNAPSHOT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Items up to which all are compared: 5,000 x 512 cost about the CPU of a graph's search (bench/speed/collection_speed.py)
EXACT_UP_TO = 5_000
EF = 300  # candidates that a search of the graph keeps (k, if that is more)
EF_CONSTRUCTION = 150  # candidates of each item when the graph is built: half of LanceDB's, and half of its time
REFINE = 2  # so many times k are compared with their exact vectors, since the graph holds 8 bits a number
# With a filter, the index asks for each of its items whether it is allowed, which takes tens of nanoseconds; to fetch
# an item takes some microseconds, as much as to ask for this many (bench/speed/collection_speed.py)
FETCH_COST = 400
SPARE = 2.5  # so many times as many candidates as give k allowed ones on average
MAX_CANDIDATES = 1_000
KEEP = timedelta(hours=1)  # how long a version stays readable for searches that are under way
IDS_AT_ONCE = 5_000  # in one expression
ROWS_AN_ID = 20  # to read so many ids one after the other costs about as much as to look one up by the index
COMMIT_TRIES = 10

Result = TypeVar("Result")


def open_lance(place: str, *, create: bool, dim: int, model: str, durable: bool) -> LanceCollection:
    """See `retrieval.collections.opening.open_collection`; `place` is a folder or a URI of object storage."""
    folder = None if "://" in place else Path(place)
    if durable and folder is None:
        raise CollectionError("durable is for folders: object storage keeps what it has acknowledged")
    if folder is not None and not create and not (folder / f"{TABLE}.lance").is_dir():
        raise CollectionError(f"no collection at {place}: make one with `mmwudao index build`")
    if folder is not None and create:
        folder.mkdir(parents=True, exist_ok=True)
        if any(not entry.name.startswith(".") and entry.name != f"{TABLE}.lance" for entry in folder.iterdir()):
            raise CollectionError(f"{place} holds other files: choose another folder for the collection")
    with _lance_errors(place), ExitStack() as stack:
        if folder is not None and create:
            stack.enter_context(FileLock(folder / ".write.lock"))
        # without an interval, a reader would never see what other processes write
        database = lancedb.connect(place, read_consistency_interval=timedelta(0))
        if TABLE in database.list_tables().tables:
            table = database.open_table(TABLE)
        elif not create:
            raise CollectionError(f"no collection at {place}: make one with `mmwudao index build`")
        elif dim < 1:
            raise CollectionError(f"a new collection needs the dimension of its vectors, not {dim}")
        else:
            # the mark of a primary key lets LanceDB see when two writers insert the same id
            key = pa.field("id", pa.string(), nullable=False, metadata={"lance-schema:unenforced-primary-key": "true"})
            fields = [key, pa.field("vector", pa.list_(pa.float32(), dim), nullable=False)]
            table = database.create_table(TABLE, schema=pa.schema(fields, {"format": FORMAT, "model": model}))
        collection = LanceCollection(place, folder, table, durable)
    if dim and dim != collection.dim:
        raise CollectionError(f"{place} holds vectors of dimension {collection.dim}, not {dim}")
    if model and collection.model and model != collection.model:
        raise CollectionError(f"{place} holds vectors of other towers ({collection.model[:12]}, not {model[:12]})")
    collection.synchronise()
    return collection


class LanceCollection(Collection):
    """See `Collection`. Methods may be called from several threads."""

    def __init__(self, place: str, folder: Path | None, table: lancedb.table.Table, durable: bool) -> None:
        metadata = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
        if metadata.get("format") != FORMAT:
            raise CollectionError(f"{place} is a LanceDB database of another program: choose another folder")
        self.place = place
        self.folder = folder
        self.durable = durable
        self.dim = table.schema.field("vector").type.list_size
        self.model = metadata["model"]
        self._table: Any = table  # the types of LanceDB do not say what its local tables can do
        self._synchronised: set[Path] = set()
        self._threads = threading.RLock()

    def close(self) -> None:
        # LanceDB frees a table's caches with the object
        del self._table

    def add(self, items: Sequence[Item] | pa.Table) -> None:
        with self._writing():
            rows = to_table(items, self.dim, self._types())
            there = self._there(rows["id"])
            if there:
                shown = ", ".join(sorted(there)[:5])
                raise IdsThere(f"{len(there)} ids are there already: {shown}; `upsert` replaces items")
            self._store(rows, replace=False)

    def upsert(self, items: Sequence[Item] | pa.Table) -> None:
        with self._writing():
            rows = to_table(items, self.dim, self._types())
            # where there is no lock, another writer may store them meanwhile: a merge sees that
            self._store(rows, replace=self.folder is None or bool(self._there(rows["id"])))

    def delete(self, ids: Sequence[str]) -> int:
        check_ids(ids)
        removed = 0
        with self._writing():
            for part in _parts(ids):
                removed += self._commit(partial(self._table.delete, _one_of(part))).num_deleted_rows
        return removed

    def get(self, ids: Sequence[str]) -> list[Item]:
        check_ids(ids)
        with _lance_errors(self.place):
            found = self._stored(ids, None)
        return [_item(found[name]) for name in ids if name in found]

    def search(self, vector: NDArray[numpy.floating], k: int = 10, where: str | None = None) -> list[Hit]:
        query = unit_vector(vector, self.dim)
        check_search(k)
        with _lance_errors(self.place):
            rows = self._nearest(query, k, self._condition(where))
        hits = [Hit(row["id"], 1 - row["_distance"], _metadata(row)) for row in rows]
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k]

    def count(self, where: str | None = None) -> int:
        with _lance_errors(self.place):
            return self._table.count_rows(self._condition(where))

    def scan(self, where: str | None = None) -> Iterator[tuple[list[str], NDArray[numpy.float32]]]:
        with _lance_errors(self.place):
            builder = self._table.search().select(["id", "vector"])
            condition = self._condition(where)
            reader = (builder.where(condition) if condition is not None else builder).to_batches(8192)
            for batch in reader:
                vectors = batch["vector"].flatten().to_numpy().reshape(-1, self.dim)
                yield batch["id"].to_pylist(), vectors

    def snapshot(self, name: str) -> None:
        _check_name(name)
        with self._writing():
            if name in self._table.tags.list():
                raise CollectionError(f"there is a snapshot {name!r} already: choose another name")
            self._table.tags.create(name, self._table.version)

    def restore(self, name: str) -> None:
        _check_name(name)
        with self._writing():
            version = self._tag(name)
            self._commit(lambda: self._table.restore(version))

    def drop_snapshot(self, name: str) -> None:
        _check_name(name)
        with self._writing():
            self._tag(name)
            self._table.tags.delete(name)

    def snapshots(self) -> list[str]:
        with _lance_errors(self.place):
            return sorted(self._table.tags.list())

    def optimise(self) -> None:
        with _lance_errors(self.place), ExitStack() as stack:
            # writers go on meanwhile: LanceDB lets the later of two commits that meet start again
            if self.folder is not None:
                try:
                    stack.enter_context(FileLock(self.folder / ".optimise.lock", timeout=0))
                except Timeout as error:
                    raise CollectionError(f"{self.place} is being optimised by another process") from error
            items = self._table.count_rows()
            index = next((index for index in self._table.list_indices() if index.columns == ["vector"]), None)
            if index is not None and index.num_unindexed_rows > index.num_indexed_rows:
                self._build_index()  # of so many new items one index is better than a series of small ones
            self._commit(lambda: self._table.optimize(cleanup_older_than=self._cleanup_age()))
            if index is None and items > EXACT_UP_TO:
                self._build_index()
            if items > EXACT_UP_TO:
                self._index_columns()
            self.synchronise()

    def synchronise(self) -> None:
        """With `durable`, see that every file of the collection lies on the disk."""
        if self.folder is None or not self.durable:
            return
        with self._threads:
            # files are never changed once written, so each is synchronised once; then the folders that name them
            fresh = {path for path in self.folder.rglob("*") if path.is_file()} - self._synchronised
            folders = {parent for path in fresh for parent in path.parents if parent.is_relative_to(self.folder)}
            if not self._synchronised:
                folders.add(self.folder.parent)
            for path in [*sorted(fresh), *sorted(folders, reverse=True)]:
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                except FileNotFoundError:  # an optimising process has removed an old version
                    continue
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            self._synchronised |= fresh

    def _nearest(self, query: NDArray[numpy.float32], k: int, condition: str | None) -> list[dict[str, Any]]:
        """The `k` nearest rows that the condition allows, or more, found in the cheapest way."""
        builder = self._table.search(query, vector_column_name="vector").distance_type("cosine")
        builder = builder.select([*self._names(), "id", "_distance"]).limit(k).ef(max(EF, k)).refine_factor(REFINE)
        if condition is None:
            return builder.to_list()
        items = self._table.count_rows()
        allowed = self._table.count_rows(condition) if items > EXACT_UP_TO else 0
        if allowed * FETCH_COST <= items:  # few: compare them all
            return builder.where(condition, prefilter=True).bypass_vector_index().to_list()
        candidates = math.ceil(SPARE * k * items / allowed)
        if candidates <= MAX_CANDIDATES and candidates * FETCH_COST <= items:  # many: some of the nearest are allowed
            builder = builder.limit(candidates).ef(max(EF, candidates)).refine_factor(1)
            rows = builder.where(condition, prefilter=False).to_list()
            if len(rows) >= k:
                return rows
            builder = builder.limit(k).ef(max(EF, k)).refine_factor(REFINE)
        return builder.where(condition, prefilter=True).to_list()

    def _build_index(self) -> None:
        graph = HnswSq(distance_type="cosine", ef_construction=EF_CONSTRUCTION)
        self._commit(lambda: self._table.create_index("vector", config=graph, replace=True))

    def _index_columns(self) -> None:
        """What filters and ids are looked up by: without, LanceDB reads all rows to find the few that are allowed."""
        indexed = {column for index in self._table.list_indices() for column in index.columns}
        for name in ["id", *self._names()]:
            if name not in indexed:
                self._commit(partial(self._table.create_index, name, config=BTree()))

    def _cleanup_age(self) -> timedelta:
        """How old a version must be to be removed: LanceDB refuses to remove any where a snapshot is among them."""
        tagged = {tag["version"] for tag in self._table.tags.list().values()}
        if not tagged:
            return KEEP
        made = [entry["timestamp"] for entry in self._table.list_versions() if entry["version"] in tagged]
        return max([KEEP, *(datetime.now(moment.tzinfo) - moment + timedelta(seconds=1) for moment in made)])

    def _tag(self, name: str) -> int:
        """The version that a snapshot remembers."""
        tags = self._table.tags.list()
        if name not in tags:
            raise CollectionError(f"no snapshot {name!r}; there are: {', '.join(sorted(tags)) or 'none'}")
        return int(tags[name]["version"])

    def _names(self) -> list[str]:
        return list(self._types())

    def _types(self) -> dict[str, type]:
        """Of the columns of metadata."""
        return {field.name: PYTHON_TYPES[field.type] for field in self._table.schema if field.name not in RESERVED}

    def _condition(self, where: str | None) -> str | None:
        if where is None:
            return None
        return to_sql(parse_where(where, {"id": str, **self._types()}))

    def _stored(self, ids: Sequence[str], columns: list[str] | None) -> dict[str, dict[str, Any]]:
        """Rows by id."""
        rows: list[dict[str, Any]] = []
        for part in _parts(ids):
            builder = self._table.search().where(_one_of(part)).limit(len(part))
            rows += (builder.select(columns) if columns else builder).to_list()
        return {row["id"]: row for row in rows}

    def _there(self, ids: pa.ChunkedArray) -> list[str]:
        """Those of `ids` that are stored."""
        if len(ids) <= IDS_AT_ONCE or len(ids) * ROWS_AN_ID <= self._table.count_rows():
            return list(self._stored(ids.to_pylist(), ["id"]))
        wanted, found = ids.combine_chunks(), []
        for batch in self._table.search().select(["id"]).to_batches(1_000_000):
            found += batch["id"].filter(pc.is_in(batch["id"], wanted)).to_pylist()
        return found

    def _store(self, rows: pa.Table, *, replace: bool) -> None:
        """Store `rows` in one commit; without `replace`, none of their ids is there."""
        if not len(rows):
            return
        new = [field for field in rows.schema if field.name not in self._table.schema.names]
        if new:
            self._commit(lambda: self._table.add_columns(new))
        schema = self._table.schema
        given = {name: rows[name] for name in rows.column_names}
        nulls = {field.name: pa.nulls(len(rows), field.type) for field in schema if field.name not in given}
        data = pa.table([(given | nulls)[name] for name in schema.names], schema=schema)
        if self.folder is not None and not replace:
            # a merge joins the new ids with those that are stored, at several times the cost; the lock is ours
            self._commit(lambda: self._table.add(data))
            return
        merge = self._table.merge_insert("id").when_not_matched_insert_all()
        if replace:
            merge = merge.when_matched_update_all()
        inserted = int(self._commit(lambda: merge.execute(data)).num_inserted_rows)
        if not replace and inserted < len(rows):
            raise CollectionError(f"another writer has stored {len(rows) - inserted} of these ids meanwhile")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time; at the end, what was written is synchronised."""
        with _lance_errors(self.place), self._threads, ExitStack() as stack:
            if self.folder is not None:
                stack.enter_context(FileLock(self.folder / ".write.lock"))
            yield
            self.synchronise()

    def _commit(self, operation: Callable[[], Result]) -> Result:
        """Do it again when another commit (of `optimise`, or of another writer on a bucket) came between."""
        for attempt in range(COMMIT_TRIES):
            try:
                return operation()
            except (RuntimeError, OSError, ValueError) as error:
                if "conflict" not in str(error).lower() or attempt == COMMIT_TRIES - 1:
                    raise
            time.sleep(random.uniform(0, 0.05 * 2**attempt))
        raise AssertionError("the last try returns or raises")


@contextmanager
def _lance_errors(place: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what LanceDB raises for a full disk, a bucket out of reach, a damaged file
        raise CollectionError(f"{place}: {' '.join(str(error).split())[:300]}") from error


def _check_name(name: str) -> None:
    if not SNAPSHOT_NAME.fullmatch(name):
        raise CollectionError(f"a snapshot's name is up to 100 letters, digits, '.', '_' and '-', not {name[:120]!r}")


def _parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    distinct = list(dict.fromkeys(ids))
    for start in range(0, len(distinct), IDS_AT_ONCE):
        yield distinct[start : start + IDS_AT_ONCE]


def _one_of(ids: Sequence[str]) -> str:
    return f"`id` IN ({', '.join(map(sql_text, ids))})"


def _metadata(row: Mapping[str, Any]) -> dict[str, Value]:
    kept = RESERVED | {"_distance"}
    return {name: value for name, value in row.items() if name not in kept and value is not None}


def _item(row: Mapping[str, Any]) -> Item:
    return Item(row["id"], numpy.asarray(row["vector"], numpy.float32), _metadata(row))
