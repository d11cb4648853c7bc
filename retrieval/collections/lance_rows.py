"""What LanceDB gives and says, in our words: rows as items, and its errors."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import pyarrow as pa

from retrieval.collections.base import CollectionError, Item, Value
from retrieval.collections.items import PYTHON_TYPES, RESERVED

CAUSES = ("no space left", "file too large", "permission denied", "read-only", "too many open files", "timed out",
          "connection refused", "access denied", "no such bucket", "not found")  # fmt: skip

logger = logging.getLogger(__name__)


@contextmanager
def lance_errors(location: str) -> Iterator[None]:
    """LanceDB's errors as `CollectionError` in our words, which name the cause where it is known."""
    try:
        yield
    except CollectionError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        # LanceDB raises these for a full disk, an unreachable bucket, a damaged file, in words of its own
        logger.info("%s: %s", location, error)
        cause = next((cause for cause in CAUSES if cause.lower() in str(error).lower()), "damaged or out of reach")
        raise CollectionError(f"{location} cannot be read or written: {cause}") from error


def metadata_types(schema: pa.Schema) -> dict[str, type]:
    """Name -> Python type of the metadata columns."""
    return {field.name: PYTHON_TYPES[field.type] for field in schema if field.name not in RESERVED}


def row_metadata(row: Mapping[str, Any]) -> dict[str, Value]:
    """The metadata of a row: what it has a value for."""
    kept = RESERVED | {"_distance"}
    return {name: value for name, value in row.items() if name not in kept and value is not None}


def row_item(row: Mapping[str, Any]) -> Item:
    """A row as an item."""
    return Item(row["id"], numpy.asarray(row["vector"], numpy.float32), row_metadata(row))
