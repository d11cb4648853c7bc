"""An option of a configuration: its default, its help and its limits, written once, at the dataclass field.

YAML files, the command line, HTTP schemas and the demo read the same field. Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

Number = int | float


def option(
    default: Any,
    help: str,
    *,
    least: Number | None = None,
    most: Number | None = None,
    above: Number | None = None,
    below: Number | None = None,
) -> Any:
    """A dataclass field with a default, one sentence of help, and limits.

    `least` <= value <= `most`; where the limit itself is not allowed, `above` < value < `below`.
    """
    metadata = {"help": help, "least": least, "most": most, "above": above, "below": below}
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def help_of(options: type, name: str) -> str:
    """The help of a field, for what is made from it by hand."""
    help: str = options.__dataclass_fields__[name].metadata["help"]  # type: ignore[attr-defined]
    return help


def check_options(config: Any) -> None:
    """Check every number of a dataclass against the limits of its field.

    Raises `ValueError` that names the field, what it may hold and what it holds.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind = getattr(field.type, "__name__", str(field.type)).removesuffix(" | None")
        if "help" not in field.metadata or kind not in ("int", "float") or value is None:
            continue
        whole, number = kind == "int", isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and within(field, value) and (not whole or value == int(value))):
            wanted = "a whole number" if whole else "a number"
            raise ValueError(f"{field.name} must be {wanted}{describe_limits(field)}, not {value!r}")


def within(field: dataclasses.Field[Any], value: Number) -> bool:
    """Whether `value` lies within the limits of a field."""
    least, most, above, below = (field.metadata.get(name) for name in ("least", "most", "above", "below"))
    return (
        (least is None or value >= least)
        and (most is None or value <= most)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def describe_limits(field: dataclasses.Field[Any]) -> str:
    """The limits of a field in words, to follow "a number": " from 0 to 1", " of at least 1", or nothing."""
    limits = {name: field.metadata.get(name) for name in ("least", "most", "above", "below")}
    if limits["least"] is not None and limits["most"] is not None:
        return f" from {limits['least']} to {limits['most']}"
    words = {"least": "of at least", "above": "above", "most": "at most", "below": "below"}
    parts = [f"{words[name]} {limits[name]}" for name in words if limits[name] is not None]
    if parts and parts[0].startswith("at most"):
        parts[0] = f"of {parts[0]}"
    return f" {' and '.join(parts)}" if parts else ""
