"""A column of a LanceDB table that gets another type, which LanceDB itself does not cast."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

WIDE = "__wide"  # of the name of a column in the making, which no item of ours has


def widen(table: Any, column: str, commit: Callable[[Callable[[], Any]], Any]) -> None:
    """Let a column of integers hold fractions, in three commits; `optimise` indexes it again.

    A process that is killed between them leaves all values, and `finish_widening` does the rest.
    """
    for index in table.list_indices():
        if index.columns == [column]:
            commit(partial(table.drop_index, index.name))
    commit(partial(table.add_columns, {column + WIDE: f"cast(`{column}` as double)"}))
    finish_widening(table, commit)


def finish_widening(table: Any, commit: Callable[[Callable[[], Any]], Any]) -> None:
    """Let columns in the making take the place of those that they were made of."""
    for name in [name for name in table.schema.names if name.endswith(WIDE)]:
        column = name.removesuffix(WIDE)
        if column in table.schema.names:
            commit(partial(table.drop_columns, [column]))
        commit(partial(table.alter_columns, {"path": name, "rename": column}))
