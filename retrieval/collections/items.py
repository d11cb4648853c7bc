"""The checks of items, ids and queries that all stores share; they run before anything is written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from retrieval.collections.base import MAX_ID, CollectionError, ExistingIdsError, Item
from retrieval.collections.where import COLUMN, INTEGERS, KEYWORDS, TYPE_NAMES

RESERVED = frozenset({"id", "vector"})
MAX_K = 10_000
UNIT = 1e-6  # vectors whose length differs from 1 by less are taken as they are
ARROW_TYPES: Mapping[type, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
PYTHON_TYPES = {kind: name for name, kind in ARROW_TYPES.items()}


def to_table(items: Sequence[Item] | pa.Table, dim: int, known: Mapping[str, type]) -> pa.Table:
    """Check `items` and return them as columns: `id`, `vector` [dim] (float32 of unit length) and the metadata.

    Metadata has the types of `ARROW_TYPES`: those of the `known` columns, and for new columns those of the values.
    Raises `CollectionError`.
    """
    if isinstance(items, pa.Table):
        return _check_table(items, dim, known)
    ids = [item.id for item in items]
    check_ids(ids)
    duplicates = [name for name, count in Counter(ids).items() if count > 1]
    if duplicates:
        raise _duplicates_error(duplicates)
    columns = {"id": pa.array(ids, pa.string()), "vector": _vector_column(_stack(items, dim), ids)}
    types = column_types(items, known)
    for name in dict.fromkeys(name for item in items for name in item.metadata):
        values = [item.metadata.get(name) for item in items]
        if types[name] is float:
            values = [None if value is None else float(value) for value in values]
        columns[name] = pa.array(values, ARROW_TYPES[types[name]])
    return pa.table(columns)


def unit_vector(vector: ArrayLike, dim: int, name: str = "the query") -> NDArray[numpy.float32]:
    """`vector` as float32 [dim] of unit length. Raises `CollectionError`."""
    return _unit_vectors(_numbers(vector, dim, name)[None], [name])[0]


def check_ids(ids: Sequence[str]) -> None:
    """Raise `CollectionError` unless `ids` are texts of 1 to `MAX_ID` characters."""
    if isinstance(ids, str):
        raise CollectionError("ids are a list of texts, not one text")
    for name in ids:
        if not isinstance(name, str) or not 1 <= len(name) <= MAX_ID or not _is_unicode(name) or "\0" in name:
            raise _bad_id(name)


def refuse_existing(ids: Collection[str]) -> None:
    """Raise `ExistingIdsError` if there are any; `ids` are those of new items that are stored already."""
    if ids:
        shown = ", ".join(sorted(ids)[:5])
        raise ExistingIdsError(f"{len(ids)} ids are stored already: {shown}; `upsert` replaces items")


def check_search(k: int) -> None:
    """Raise `CollectionError` unless a search may return `k` items."""
    if not 1 <= k <= MAX_K:
        raise CollectionError(f"a search returns 1 to {MAX_K} items, not {k}")


def column_types(items: Sequence[Item], known: Mapping[str, type]) -> dict[str, type]:
    """Name -> str, int, float or bool for the `known` columns and those that `items` add. Raises `CollectionError`.

    A float column accepts integers; a column that holds both becomes a float column, also if it is known.
    """
    types = dict(known)
    for item in items:
        for name, value in item.metadata.items():
            if name not in types:
                _check_name(name)
            kind = type(value)
            refused = kind not in TYPE_NAMES or (isinstance(value, str) and not _is_unicode(value))
            if refused or _out_of_range(value):
                raise CollectionError(
                    f"{item.id}: a metadata value is text, a number, true or false, not {name} = {str(value)[:40]!r}"
                )
            stored = types.setdefault(name, kind)
            if stored is int and kind is float:
                types[name] = float  # of a known column, too: the store widens it
            elif kind is not stored and not (stored is float and kind is int):
                raise CollectionError(f"{item.id}: {name} is {TYPE_NAMES[stored]} here, not {str(value)[:40]!r}")
    return types


def _check_table(table: pa.Table, dim: int, known: Mapping[str, type]) -> pa.Table:
    names = table.column_names
    if len(set(names)) < len(names) or not set(names) >= RESERVED:
        raise CollectionError(f"a table has one column each for id, vector and metadata, not {', '.join(names)[:200]}")
    ids = _id_column(table["id"])
    columns = {"id": ids, "vector": _vector_column(_matrix(table["vector"], ids, dim), ids)}
    for name in names:
        if name not in RESERVED and table[name].null_count < len(table):
            if name not in known:
                _check_name(name)
            columns[name] = _metadata_column(table[name], name, known.get(name), ids)
    return pa.table(columns)


def _id_column(column: pa.ChunkedArray) -> pa.Array:
    try:
        ids = pa.concat_arrays(column.cast(pa.string()).chunks) if _is_text(column.type) else None
    except pa.ArrowInvalid as error:  # more than 2 GB of ids
        raise CollectionError(f"a single table cannot hold so many ids, give several: {error}") from error
    if ids is None:
        raise CollectionError(f"the column id holds {column.type}: ids are texts")
    lengths = pc.utf8_length(ids)
    wrong = pc.or_(pc.or_(pc.less(lengths, 1), pc.greater(lengths, MAX_ID)), pc.match_substring(ids, "\0"))
    row = _first_true(pc.fill_null(wrong, True))
    if row is not None:
        raise _bad_id(ids[row].as_py())
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = pc.value_counts(ids)
        raise _duplicates_error(counts.field("values").filter(pc.greater(counts.field("counts"), 1)).to_pylist())
    return ids


def _matrix(column: pa.ChunkedArray, ids: pa.Array, dim: int) -> NDArray[numpy.float32]:
    """The vectors [N, dim] of a column of lists."""
    kind = column.type
    lists = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not lists or not pa.types.is_floating(kind.value_type):
        raise CollectionError(f"the column vector holds {kind}: vectors are lists of float16, float32 or float64")
    row = _first_true(pc.fill_null(pc.not_equal(pc.list_value_length(column), dim), True))
    if row is not None:
        raise CollectionError(f"{ids[row]}: its vector does not have {dim} numbers, as those of this collection do")
    numbers = pa.concat_arrays([chunk.flatten() for chunk in column.chunks] or [pa.array([], kind.value_type)])
    # a null becomes NaN, which is refused later
    with numpy.errstate(over="ignore"):
        return numpy.asarray(numbers.to_numpy(zero_copy_only=False), numpy.float32).reshape(-1, dim)


def _metadata_column(column: pa.ChunkedArray, name: str, known: type | None, ids: pa.Array) -> pa.ChunkedArray:
    given = next((kind for kind, is_kind in KINDS if is_kind(column.type)), None)
    if given is None:
        raise CollectionError(f"{name} holds {column.type}: metadata is text, integers, numbers, true or false")
    kind = float if {known, given} == {int, float} else known or given
    if kind is not given and kind is not float:
        raise CollectionError(f"{name} is {TYPE_NAMES[kind]} here, and {TYPE_NAMES[given]} in the table")
    try:
        cast = column.cast(ARROW_TYPES[kind], safe=kind is not float)
    except pa.ArrowInvalid as error:
        raise CollectionError(f"{name}: {' '.join(str(error).split())[:200]}") from error
    row = _first_true(pc.invert(pc.fill_null(pc.is_finite(cast), True))) if kind is float else None
    if row is not None:
        raise CollectionError(f"{ids[row]}: {name} is {cast[row]}, but numbers in metadata must be finite")
    return cast


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


KINDS = (
    (str, _is_text),
    (int, pa.types.is_integer),
    (float, pa.types.is_floating),
    (bool, pa.types.is_boolean),
)


def _first_true(mask: pa.Array | pa.ChunkedArray) -> int | None:
    """The index of the first true value, or None."""
    index: int = pc.index(mask, True).as_py()
    return None if index < 0 else index


def _stack(items: Sequence[Item], dim: int) -> NDArray[numpy.float32]:
    """The vectors [N, dim] of `items`, of any length."""
    vectors = numpy.empty((len(items), dim), numpy.float32)
    for k, item in enumerate(items):
        vectors[k] = _numbers(item.vector, dim, item.id)
    return vectors


def _numbers(vector: ArrayLike, dim: int, name: str) -> NDArray[numpy.float32]:
    try:
        given = numpy.asarray(vector, numpy.float32)
    except (TypeError, ValueError) as error:
        raise CollectionError(f"{name}: its vector does not consist of numbers") from error
    if given.shape != (dim,):
        raise CollectionError(f"{name}: its vector has the shape {list(given.shape)}, not [{dim}] as here")
    return given


def _vector_column(vectors: NDArray[numpy.float32], ids: Sequence[str] | pa.Array) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(_unit_vectors(vectors, ids).reshape(-1)), vectors.shape[1])


def _unit_vectors(vectors: NDArray[numpy.float32], ids: Sequence[str] | pa.Array) -> NDArray[numpy.float32]:
    lengths = numpy.sqrt(numpy.einsum("nd,nd->n", vectors, vectors))
    usable = numpy.isfinite(lengths) & (lengths > 0)
    if not usable.all():
        raise CollectionError(f"{ids[int(numpy.argmin(usable))]}: its vector is zero, or not finite")
    if numpy.abs(lengths - 1).max(initial=0) < UNIT:
        return vectors  # the normal case, of vectors from towers: copying a gigabyte takes longer than measuring it
    return vectors / lengths[:, None]


def _duplicates_error(ids: Sequence[str]) -> CollectionError:
    return CollectionError(f"ids that are given twice: {', '.join(ids[:5])}")


def _bad_id(name: object) -> CollectionError:
    return CollectionError(f"an id is a text of 1 to {MAX_ID} characters, none of them NUL, not {str(name)[:40]!r}")


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not COLUMN.fullmatch(name) or name.lower() in RESERVED | KEYWORDS:
        raise CollectionError(
            f"a metadata name is up to 64 ASCII letters, digits and _, starts with a letter, and is none of "
            f"{', '.join(sorted(RESERVED | KEYWORDS))}: {str(name)[:80]!r}"
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _out_of_range(value: object) -> bool:
    return (type(value) is int and value not in INTEGERS) or (type(value) is float and not math.isfinite(value))
