"""A collection on a Milvus server, for more vectors than one machine can serve: `http://host:19530/name`.

Items are rows with dynamic fields. The collection's properties store the types of the metadata, so that filters are
checked as in the other stores. Milvus acknowledges a write once its write-ahead log holds it. It has no transactions:
two writers that add the same id at the same time do not see each other, and the later one wins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy
import pyarrow as pa
from numpy.typing import NDArray

from data.records import parse_json
from retrieval.collections.base import FORMAT, MAX_ID, Collection, CollectionError, Hit, Item, Value, check_identity
from retrieval.collections.items import (
    PYTHON_TYPES,
    RESERVED,
    check_ids,
    check_search,
    refuse_existing,
    to_table,
    unit_vector,
)
from retrieval.collections.where import parse_where, to_milvus

PROPERTY = "mmwudao."
COLLECTION_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
TYPES: dict[str, type] = {kind.__name__: kind for kind in (str, int, float, bool)}
ROWS_AT_ONCE = 1_000  # one message to Milvus holds at most 64 MB
GRAPH = {"M": 20, "efConstruction": 300}
EF = 200  # candidates that a search of the graph keeps (k, if that is more)


def open_milvus(location: str, *, create: bool, dim: int, model: str, durable: bool) -> MilvusCollection:
    """See `retrieval.collections.opening.open_collection`; `location` is `http://[user:password@]host:port/name`."""
    try:
        from pymilvus import MilvusClient, MilvusException
    except ImportError as error:
        raise CollectionError("a Milvus server is reached with pymilvus: pip install 'mmwudao[milvus]'") from error
    if durable:
        raise CollectionError("durable is for folders: a Milvus server keeps what it has acknowledged")
    address = urlsplit(location)
    name = address.path.strip("/")
    if not address.hostname or not COLLECTION_NAME.fullmatch(name):
        raise CollectionError("this does not name a collection of a Milvus server: give http://host:port/name")
    shown = f"{address.scheme}://{address.hostname}:{address.port or 19530}/{name}"  # without a password
    token = f"{address.username}:{address.password or ''}" if address.username else ""
    with _milvus_errors(shown):
        try:
            client = MilvusClient(shown.removesuffix(f"/{name}"), token=token, timeout=30)
        except MilvusException as error:
            raise CollectionError(f"no Milvus server answers at {shown}") from error
        if not client.has_collection(name):
            if not create:
                raise CollectionError(f"no collection at {shown}: make one with `mmwudao index build`")
            if dim < 1:
                raise CollectionError(f"a new collection needs the dimension of its vectors, not {dim}")
            _create(client, name, dim, model)
        client.load_collection(name)  # after a restart the server may have it on disk only
        collection = MilvusCollection(shown, name, client)
    check_identity(collection, shown, dim, model)
    return collection


def _create(client: Any, name: str, dim: int, model: str) -> None:
    from pymilvus import DataType

    schema = client.create_schema(enable_dynamic_field=True)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=4 * MAX_ID)  # bytes of UTF-8
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="HNSW", metric_type="COSINE", params=GRAPH)
    client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")
    properties = {"format": FORMAT, "model": model, "dim": str(dim), "columns": "{}"}
    client.alter_collection_properties(name, {PROPERTY + key: value for key, value in properties.items()})


class MilvusCollection(Collection):
    """See `Collection`. Snapshots raise `CollectionError`: Milvus has its own tool for them, Milvus Backup."""

    def __init__(self, location: str, name: str, client: Any) -> None:
        self.location = location
        self._name = name
        self._client = client
        properties = self._properties()
        if properties.get("format") != FORMAT:
            raise CollectionError(f"{location} is a collection of another program: choose another name")
        self.dim = int(properties["dim"])
        self.model = properties["model"]

    def close(self) -> None:
        self._client.close()

    def add(self, items: Sequence[Item] | pa.Table) -> None:
        with _milvus_errors(self.location):
            known = self._columns()
            rows = to_table(items, self.dim, known)
            refuse_existing(self._stored(rows["id"].to_pylist(), ["id"]))
            self._store(rows, known)

    def upsert(self, items: Sequence[Item] | pa.Table) -> None:
        with _milvus_errors(self.location):
            known = self._columns()
            self._store(to_table(items, self.dim, known), known)

    def delete(self, ids: Sequence[str]) -> int:
        check_ids(ids)
        with _milvus_errors(self.location):
            existing = list(self._stored(ids, ["id"]))
            for start in range(0, len(existing), ROWS_AT_ONCE):
                self._client.delete(self._name, ids=existing[start : start + ROWS_AT_ONCE])
        return len(existing)

    def get(self, ids: Sequence[str]) -> list[Item]:
        check_ids(ids)
        with _milvus_errors(self.location):
            rows = self._stored(ids, ["*"])
        stored = [rows[name] for name in ids if name in rows]
        return [Item(row["id"], numpy.asarray(row["vector"], numpy.float32), _metadata(row)) for row in stored]

    def search(self, vector: NDArray[numpy.floating], k: int = 10, where: str | None = None) -> list[Hit]:
        query = unit_vector(vector, self.dim)
        check_search(k)
        with _milvus_errors(self.location):
            columns = self._columns()
            rows = self._client.search(
                self._name,
                data=[query.tolist()],
                limit=k,
                filter=self._condition(where, columns),
                output_fields=["id", *columns],
                search_params={"params": {"ef": max(EF, k)}},
            )[0]
        hits = [Hit(row["id"], float(row["distance"]), _metadata(row["entity"])) for row in rows]
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))

    def count(self, where: str | None = None) -> int:
        with _milvus_errors(self.location):
            condition = self._condition(where, self._columns())
            return int(self._client.query(self._name, filter=condition, output_fields=["count(*)"])[0]["count(*)"])

    def scan(self, where: str | None = None) -> Iterator[tuple[list[str], NDArray[numpy.float32]]]:
        with _milvus_errors(self.location):
            condition = self._condition(where, self._columns())
            rows = self._client.query_iterator(
                self._name, batch_size=ROWS_AT_ONCE, filter=condition, output_fields=["id", "vector"]
            )
            while batch := rows.next():
                yield [row["id"] for row in batch], numpy.array([row["vector"] for row in batch], numpy.float32)
            rows.close()

    def snapshot(self, name: str) -> None:
        raise CollectionError("snapshots of a Milvus server are made with its own Milvus Backup")

    def restore(self, name: str) -> None:
        raise CollectionError("snapshots of a Milvus server are restored with its own Milvus Backup")

    def drop_snapshot(self, name: str) -> None:
        raise CollectionError("snapshots of a Milvus server are dropped with its own Milvus Backup")

    def snapshots(self) -> list[str]:
        return []

    def optimise(self) -> None:
        with _milvus_errors(self.location):
            self._client.flush(self._name)
            self._client.compact(self._name)

    def _store(self, rows: pa.Table, known: dict[str, type]) -> None:
        types = known | {field.name: PYTHON_TYPES[field.type] for field in rows.schema if field.name not in RESERVED}
        if types != known:
            columns = json.dumps({name: kind.__name__ for name, kind in types.items()})
            self._client.alter_collection_properties(self._name, {f"{PROPERTY}columns": columns})
        for batch in rows.to_batches(ROWS_AT_ONCE):
            given = [{name: value for name, value in row.items() if value is not None} for row in batch.to_pylist()]
            self._client.upsert(self._name, given)

    def _properties(self) -> dict[str, str]:
        stored = self._client.describe_collection(self._name)["properties"]
        return {key.removeprefix(PROPERTY): value for key, value in stored.items() if key.startswith(PROPERTY)}

    def _columns(self) -> dict[str, type]:
        return {name: TYPES[kind] for name, kind in parse_json(self._properties()["columns"]).items()}

    def _condition(self, where: str | None, columns: dict[str, type]) -> str:
        return to_milvus(parse_where(where, {"id": str, **columns})) if where is not None else ""

    def _stored(self, ids: Sequence[str], fields: list[str]) -> dict[str, dict[str, Any]]:
        distinct = list(dict.fromkeys(ids))
        rows: list[dict[str, Any]] = []
        for start in range(0, len(distinct), ROWS_AT_ONCE):
            rows += self._client.get(self._name, ids=distinct[start : start + ROWS_AT_ONCE], output_fields=fields)
        return {row["id"]: row for row in rows}


@contextmanager
def _milvus_errors(location: str) -> Iterator[None]:
    import grpc
    from pymilvus import MilvusException

    try:
        yield
    except (MilvusException, grpc.RpcError) as error:
        raise CollectionError(f"{location}: {' '.join(str(error).split())[:300]}") from error


def _metadata(row: dict[str, Any]) -> dict[str, Value]:
    return {name: value for name, value in row.items() if name not in ("id", "vector") and value is not None}
