"""An option of a configuration: its default, its help and its limits, written once, at the dataclass field.

YAML files, the command line, HTTP schemas and the demo read the same field. Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Literal

Number = int | float
# what bounds a number that has no other bound, so that a slip is told before memory or patience runs out
COUNT = 10**9  # of steps, samples, rows
SIDE = 8192  # px, of a picture
WIDTH = 2**16  # of a layer
DEPTH = 1024  # layers, heads, blocks

_NUMBERS = re.compile(r"(?P<many>(?:list|tuple)\[)?(?P<kind>int|float)(?:, ?(?:int|float|\.\.\.))*(?:\])?")


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    least: Number | None = None,
    most: Number | None = None,
    above: Number | None = None,
    below: Number | None = None,
) -> Any:
    """A dataclass field with a default (none: it must be given), one sentence of help, and limits.

    `least` <= value <= `most`; where the limit itself is not allowed, `above` < value < `below`. Those of a list are
    the limits of each number in it.
    """
    metadata = {"help": help, "least": least, "most": most, "above": above, "below": below}
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def help_of(options: type, name: str) -> str:
    """The help of a field with its limits, for what is made from it by hand."""
    return full_help(options.__dataclass_fields__[name])  # type: ignore[attr-defined]


def full_help(field: dataclasses.Field[Any]) -> str:
    """The help of a field, and its limits where it has any."""
    text: str = field.metadata["help"]
    limits, kind = describe_limits(field).strip(), number_kind(field)
    if not limits or kind is None:
        return text
    return f"{text} ({_KIND_NAMES[kind]} {limits})"


def number_kind(field: dataclasses.Field[Any]) -> Literal["int", "float"] | None:
    """Whether a field holds a whole number or any number, or several of them; None for what is no number."""
    match = _NUMBERS.fullmatch(_type_text(field))
    return None if match is None else ("int" if match["kind"] == "int" else "float")


def _type_text(field: dataclasses.Field[Any]) -> str:
    kind = field.type
    text = kind if isinstance(kind, str) else getattr(kind, "__name__", "") if type(kind) is type else str(kind)
    return text.removesuffix(" | None")


_KIND_NAMES = {"int": "a whole number", "float": "a number"}


def check_options(config: Any) -> None:
    """Check every number of a dataclass against the limits of its field.

    Raises `ValueError` that names the field, what it may hold and what it holds.
    """
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), number_kind(field)
        if "help" not in field.metadata or kind is None or value is None:
            continue
        for number in value if isinstance(value, list | tuple) else [value]:
            plain = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
            if not (plain and within(field, number) and (kind == "float" or number == int(number))):
                wanted = f"{_KIND_NAMES[kind]}{describe_limits(field)}"
                if "[" in _type_text(field):
                    raise ValueError(f"{field.name} must hold numbers, each {wanted}, not {value!r}")
                raise ValueError(f"{field.name} must be {wanted}, not {value!r}")


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
    """The limits of a field in words, to follow "a number": " from 0 to 1", " of at least 1", or nothing.

    A bound that only a slip reaches stands last: " of at least 1 and at most 1000000000".
    """
    limits = {name: field.metadata.get(name) for name in ("least", "most", "above", "below")}
    if limits["least"] is not None and limits["most"] is not None and (
        limits["most"] < DEPTH or limits["least"] > 2
    ):
        return f" from {limits['least']} to {limits['most']}"
    words = {"least": "of at least", "above": "above", "most": "at most", "below": "below"}
    parts = [f"{words[name]} {limits[name]}" for name in words if limits[name] is not None]
    if parts and parts[0].startswith("at most"):
        parts[0] = f"of {parts[0]}"
    return f" {' and '.join(parts)}" if parts else ""
