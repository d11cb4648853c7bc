"""A collection as a LanceDB table, in a folder (no server is needed) or in a bucket that many searchers share.

A write makes a new version of the table: its files are written first, then a manifest that names them is put in place
atomically, so a process that is killed at any moment leaves the previous version. Writers of one folder take turns
with a lock. In a bucket there is none: a manifest is put in place only if none of its number is there (a conditional
put, which S3 and its like have), and the writer that comes second starts its commit again on top of the first. If two
add the same id at once, one of them gets an error.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
from numpy.typing import NDArray

from retrieval.collections import lance_search
from retrieval.collections.base import FORMAT, Collection, CollectionError, Hit, Item, check_identity
from retrieval.collections.items import RESERVED, check_ids, check_search, refuse_existing, to_table, unit_vector
from retrieval.collections.lance_columns import finish_widening, widen
from retrieval.collections.lance_index import build_vector_index, index_columns
from retrieval.collections.lance_rows import lance_errors, metadata_types, row_item
from retrieval.collections.lance_search import LanceSearcher, on_loop
from retrieval.collections.where import parse_where, sql_text, to_sql

TABLE = "items"
SNAPSHOT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
KEEP = timedelta(hours=1)  # how long an old version stays readable for running searches
IDS_AT_ONCE = 5_000  # in one expression
ROWS_AN_ID = 20  # reading this many ids in a scan costs about as much as looking up one in the index
COMMIT_TRIES = 10

Result = TypeVar("Result")


def open_lance(location: str, *, create: bool, dim: int, model: str, durable: bool) -> LanceCollection:
    """See `retrieval.collections.opening.open_collection`; `location` is a folder or an object storage URI."""
    folder = None if "://" in location else Path(location)
    if durable and folder is None:
        raise CollectionError("durable is for folders: object storage keeps what it has acknowledged")
    if folder is not None and not create and not (folder / f"{TABLE}.lance").is_dir():
        raise CollectionError(f"no collection at {location}: make one with `mmwudao index build`")
    if folder is not None and create:
        folder.mkdir(parents=True, exist_ok=True)
        if any(not entry.name.startswith(".") and entry.name != f"{TABLE}.lance" for entry in folder.iterdir()):
            raise CollectionError(f"{location} holds other files: choose another folder for the collection")
    with lance_errors(location), ExitStack() as stack:
        if folder is not None and create:
            stack.enter_context(FileLock(folder / ".write.lock"))
        # without an interval, a reader would never see what other processes write
        database = lancedb.connect(location, read_consistency_interval=timedelta(0))
        if TABLE in database.list_tables().tables:
            table = database.open_table(TABLE)
        elif not create:
            raise CollectionError(f"no collection at {location}: make one with `mmwudao index build`")
        elif dim < 1:
            raise CollectionError(f"a new collection needs the dimension of its vectors, not {dim}")
        else:
            # marking the primary key lets LanceDB notice when two writers insert the same id
            key = pa.field("id", pa.string(), nullable=False, metadata={"lance-schema:unenforced-primary-key": "true"})
            fields = [key, pa.field("vector", pa.list_(pa.float32(), dim), nullable=False)]
            schema = pa.schema(fields, {"format": FORMAT, "model": model})
            try:
                table = database.create_table(TABLE, schema=schema)
            except (RuntimeError, ValueError):
                if TABLE not in database.list_tables().tables:  # else another writer of a bucket was first
                    raise
                table = database.open_table(TABLE)
        searcher = LanceSearcher(on_loop(_open_reader(location)), table.schema.field("vector").type.list_size)
        collection = LanceCollection(location, folder, table, searcher, durable)
    check_identity(collection, location, dim, model)
    collection.synchronise()
    return collection


async def _open_reader(location: str) -> lancedb.table.AsyncTable:
    database = await lancedb.connect_async(location, read_consistency_interval=timedelta(0))
    return await database.open_table(TABLE)


class LanceCollection(Collection):
    """See `Collection`. Methods may be called from several threads."""

    def __init__(
        self, location: str, folder: Path | None, table: lancedb.table.Table, searcher: LanceSearcher, durable: bool
    ) -> None:
        metadata = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
        if metadata.get("format") != FORMAT:
            raise CollectionError(f"{location} is a LanceDB database of another program: choose another folder")
        self.location = location
        self.folder = folder
        self.durable = durable
        self.dim = table.schema.field("vector").type.list_size
        self.model = metadata["model"]
        self._table: Any = table  # LanceDB's type annotations lack methods of its local tables
        self._searcher = searcher
        self._synchronised: set[Path] = set()
        self._threads = threading.RLock()

    def close(self) -> None:
        # LanceDB frees the caches of a table together with the object
        del self._table, self._searcher

    def add(self, items: Sequence[Item] | pa.Table) -> None:
        with self._writing():
            rows = to_table(items, self.dim, self._types())
            refuse_existing(self._existing(rows["id"]))
            self._store(rows, replace=False)

    def upsert(self, items: Sequence[Item] | pa.Table) -> None:
        with self._writing():
            rows = to_table(items, self.dim, self._types())
            # without a lock, another writer may store the same ids in the meantime, which only a merge notices
            self._store(rows, replace=self.folder is None or bool(self._existing(rows["id"])))

    def delete(self, ids: Sequence[str]) -> int:
        check_ids(ids)
        removed = 0
        with self._writing():
            for chunk in _chunks(ids):
                removed += self._commit(partial(self._table.delete, _one_of(chunk))).num_deleted_rows
        return removed

    def get(self, ids: Sequence[str]) -> list[Item]:
        check_ids(ids)
        with lance_errors(self.location):
            rows = self._stored(ids, None)
        return [row_item(rows[name]) for name in ids if name in rows]

    def search(self, vector: NDArray[numpy.floating], k: int = 10, where: str | None = None) -> list[Hit]:
        query = unit_vector(vector, self.dim)
        check_search(k)
        with lance_errors(self.location):
            return self._searcher.search(query, k, where)

    def count(self, where: str | None = None) -> int:
        with lance_errors(self.location):
            return self._table.count_rows(self._condition(where))

    def scan(self, where: str | None = None) -> Iterator[tuple[list[str], NDArray[numpy.float32]]]:
        with lance_errors(self.location):
            builder = self._table.search().select(["id", "vector"])
            condition = self._condition(where)
            reader = (builder.where(condition) if condition is not None else builder).to_batches(8192)
            for batch in reader:
                vectors = batch["vector"].flatten().to_numpy().reshape(-1, self.dim)
                yield batch["id"].to_pylist(), vectors

    def ids(self, where: str | None = None) -> Iterator[list[str]]:
        with lance_errors(self.location):
            builder = self._table.search().select(["id"])
            condition = self._condition(where)
            for batch in (builder.where(condition) if condition is not None else builder).to_batches(65_536):
                yield batch["id"].to_pylist()

    def snapshot(self, name: str) -> None:
        _check_name(name)
        with self._writing():
            if name in self._table.tags.list():
                raise CollectionError(f"the snapshot {name!r} exists already: choose another name")
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
        with lance_errors(self.location):
            return sorted(self._table.tags.list())

    def optimise(self) -> None:
        with lance_errors(self.location), ExitStack() as stack:
            # writers may go on at the same time: of two conflicting commits, LanceDB lets the later one start again
            if self.folder is not None:
                try:
                    stack.enter_context(FileLock(self.folder / ".optimise.lock", timeout=0))
                except Timeout as error:
                    raise CollectionError(f"{self.location} is being optimised by another process") from error
            items = self._table.count_rows()
            index = next((index for index in self._table.list_indices() if index.columns == ["vector"]), None)
            if index is not None and index.num_unindexed_rows > index.num_indexed_rows:
                # for that many new items one new index is better than a series of small ones
                build_vector_index(self._table, self._commit)
            self._commit(lambda: self._table.optimize(cleanup_older_than=self._cleanup_age()))
            if items > lance_search.EXACT_UP_TO:
                if index is None:
                    build_vector_index(self._table, self._commit)
                index_columns(self._table, ["id", *self._names()], self._commit)
            self.synchronise()

    def synchronise(self) -> None:
        """With `durable`, flush every file of the collection to the disk."""
        if self.folder is None or not self.durable:
            return
        with self._threads:
            # files never change once written, so each is flushed once; after them, the folders that list them
            fresh = {path for path in self.folder.rglob("*") if path.is_file()} - self._synchronised
            folders = {parent for path in fresh for parent in path.parents if parent.is_relative_to(self.folder)}
            if not self._synchronised:
                folders.add(self.folder.parent)
            for path in [*sorted(fresh), *sorted(folders, reverse=True)]:
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                except FileNotFoundError:  # `optimise` in another process has removed an old version
                    continue
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            self._synchronised |= fresh

    def _cleanup_age(self) -> timedelta:
        """How old a version must be to be removed: LanceDB removes none if a snapshot is among those old enough."""
        tagged = {tag["version"] for tag in self._table.tags.list().values()}
        if not tagged:
            return KEEP
        created = [entry["timestamp"] for entry in self._table.list_versions() if entry["version"] in tagged]
        return max([KEEP, *(datetime.now(moment.tzinfo) - moment + timedelta(seconds=1) for moment in created)])

    def _tag(self, name: str) -> int:
        """The version that a snapshot names."""
        tags = self._table.tags.list()
        if name not in tags:
            raise CollectionError(f"no snapshot {name!r}; there are: {', '.join(sorted(tags)) or 'none'}")
        return int(tags[name]["version"])

    def _names(self) -> list[str]:
        return list(self._types())

    def _types(self) -> dict[str, type]:
        return metadata_types(self._table.schema)

    def _condition(self, where: str | None) -> str | None:
        if where is None:
            return None
        return to_sql(parse_where(where, {"id": str, **self._types()}))

    def _stored(self, ids: Sequence[str], columns: list[str] | None) -> dict[str, dict[str, Any]]:
        """Rows by id."""
        rows: list[dict[str, Any]] = []
        for chunk in _chunks(ids):
            builder = self._table.search().where(_one_of(chunk)).limit(len(chunk))
            rows += (builder.select(columns) if columns else builder).to_list()
        return {row["id"]: row for row in rows}

    def _existing(self, ids: pa.ChunkedArray) -> list[str]:
        """Those of `ids` that are stored."""
        if len(ids) <= IDS_AT_ONCE or len(ids) * ROWS_AN_ID <= self._table.count_rows():
            return list(self._stored(ids.to_pylist(), ["id"]))
        wanted, existing = ids.combine_chunks(), []
        for batch in self._table.search().select(["id"]).to_batches(1_000_000):
            existing += batch["id"].filter(pc.is_in(batch["id"], wanted)).to_pylist()
        return existing

    def _store(self, rows: pa.Table, *, replace: bool) -> None:
        """Store `rows` in one commit; without `replace`, none of their ids may exist."""
        if not len(rows):
            return
        finish_widening(self._table, self._commit)  # of a process that was killed
        types = self._types()
        for field in rows.schema:
            if types.get(field.name) is int and field.type == pa.float64():
                widen(self._table, field.name, self._commit)
        self._add_columns(rows.schema)
        schema = self._table.schema
        given = {name: rows[name] for name in rows.column_names}
        nulls = {field.name: pa.nulls(len(rows), field.type) for field in schema if field.name not in given}
        data = pa.table([(given | nulls)[name] for name in schema.names], schema=schema)
        if self.folder is not None and not replace:
            # a merge joins new and stored ids, at several times the cost; we hold the lock and need none
            self._commit(lambda: self._table.add(data))
            return
        merge = self._table.merge_insert("id").when_not_matched_insert_all()
        if replace:
            merge = merge.when_matched_update_all()
        inserted = int(self._commit(lambda: merge.execute(data)).num_inserted_rows)
        if not replace and inserted < len(rows):
            raise CollectionError(f"another writer has stored {len(rows) - inserted} of these ids since: try again")

    def _add_columns(self, wanted: pa.Schema) -> None:
        """Make the columns that are missing. Another writer of a bucket may make the same ones at the same time."""
        while new := [field for field in wanted if field.name not in self._table.schema.names]:
            try:
                self._commit(partial(self._table.add_columns, new))
            except (RuntimeError, ValueError) as error:
                if "already exists" not in str(error):
                    raise
                self._table.checkout_latest()
        for field in wanted:
            if field.name not in RESERVED and self._table.schema.field(field.name).type != field.type:
                raise CollectionError(f"another writer has made the column {field.name} of another type: try again")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time; what it wrote is flushed at the end."""
        with lance_errors(self.location), self._threads, ExitStack() as stack:
            if self.folder is not None:
                stack.enter_context(FileLock(self.folder / ".write.lock"))
            yield
            self.synchronise()

    def _commit(self, operation: Callable[[], Result]) -> Result:
        """Run a commit, again if it conflicts with another (of `optimise`, or of another writer of a bucket)."""
        for attempt in range(COMMIT_TRIES):
            try:
                return operation()
            except (RuntimeError, OSError, ValueError) as error:
                if "conflict" not in str(error).lower() or attempt == COMMIT_TRIES - 1:
                    raise
            time.sleep(random.uniform(0, 0.05 * 2**attempt))
        raise AssertionError("the last try returns or raises")


def _check_name(name: str) -> None:
    if not SNAPSHOT_NAME.fullmatch(name):
        raise CollectionError(f"a snapshot's name is up to 100 letters, digits, '.', '_' and '-', not {name[:120]!r}")


def _chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    distinct = list(dict.fromkeys(ids))
    for start in range(0, len(distinct), IDS_AT_ONCE):
        yield distinct[start : start + IDS_AT_ONCE]


def _one_of(ids: Sequence[str]) -> str:
    return f"`id` IN ({', '.join(map(sql_text, ids))})"
