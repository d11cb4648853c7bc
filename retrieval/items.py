"""What every kind of collection asks of items, ids and queries, checked before anything is written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy
from numpy.typing import ArrayLike, NDArray

from retrieval.collection import MAX_ID, CollectionError, Item
from retrieval.where import COLUMN, KEYWORDS, TYPE_NAMES

RESERVED = frozenset({"id", "vector"})
MAX_K = 10_000
INTEGERS = range(-(2**63), 2**63)


def check_items(items: Sequence[Item], dim: int) -> NDArray[numpy.float32]:
    """Their vectors [N, dim], L2-normalised. Raises `CollectionError`; metadata is left to `column_types`."""
    check_ids([item.id for item in items])
    twice = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise CollectionError(f"ids that are given twice: {', '.join(twice[:5])}")
    vectors = numpy.empty((len(items), dim), numpy.float32)
    for k, item in enumerate(items):
        vectors[k] = unit_vector(item.vector, dim, item.id)
    return vectors


def unit_vector(vector: ArrayLike, dim: int, name: str = "the query") -> NDArray[numpy.float32]:
    """`vector` as float32 [dim] of unit length. Raises `CollectionError`."""
    try:
        given = numpy.asarray(vector, numpy.float32)
    except (TypeError, ValueError) as error:
        raise CollectionError(f"{name}: its vector does not consist of numbers") from error
    if given.shape != (dim,):
        raise CollectionError(f"{name}: a vector of shape {list(given.shape)}, where [{dim}] is stored")
    length = numpy.linalg.norm(given)
    if not numpy.isfinite(length) or length == 0:
        raise CollectionError(f"{name}: its vector is zero, or not finite")
    return given / length


def check_ids(ids: Sequence[str]) -> None:
    """`CollectionError` unless they are texts of 1 to `MAX_ID` characters."""
    if isinstance(ids, str):
        raise CollectionError("ids are a list of texts, not one text")
    for name in ids:
        if not isinstance(name, str) or not 1 <= len(name) <= MAX_ID or not _is_unicode(name) or "\0" in name:
            raise CollectionError(f"an id is a text of 1 to {MAX_ID} characters, not {str(name)[:40]!r}")


def check_search(k: int) -> None:
    """`CollectionError` unless so many items may be asked for."""
    if not 1 <= k <= MAX_K:
        raise CollectionError(f"a search finds 1 to {MAX_K} items, not {k}")


def column_types(items: Sequence[Item], known: Mapping[str, type]) -> dict[str, type]:
    """Name -> str, int, float or bool of `known` columns and those that `items` add. Raises `CollectionError`.

    Integers fit into a column of numbers; a column that is new and holds both is one of numbers.
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
                    f"{item.id}: metadata is text, a number, true or false, not {name} = {str(value)[:40]!r}"
                )
            there = types.setdefault(name, kind)
            if there is int and kind is float and name not in known:
                types[name] = float
            elif kind is not there and not (there is float and kind is int):
                raise CollectionError(f"{item.id}: {name} is {TYPE_NAMES[there]} here, not {str(value)[:40]!r}")
    return types


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not COLUMN.fullmatch(name) or name.lower() in RESERVED | KEYWORDS:
        raise CollectionError(
            f"a name of metadata is up to 64 of the letters a to z, digits and _, starts with a letter, and is not "
            f"{', '.join(sorted(RESERVED | KEYWORDS))}: {str(name)[:80]!r}"
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _out_of_range(value: object) -> bool:
    return (type(value) is int and value not in INTEGERS) or (type(value) is float and not math.isfinite(value))
