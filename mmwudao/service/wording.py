"""Pydantic's account of a wrong request in words: which of the user's fields is wrong, and what it may hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Place = tuple[str | int, ...]

# type of pydantic's error -> what the field may hold
KINDS = {
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
}
# what a value of the right kind may not be, with the names in pydantic's context filled in
LIMITS = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "may have at most {max_length} characters",
    "string_unicode": "is not valid Unicode (half of a surrogate pair)",
    "string_pattern_mismatch": "is no name of a column: up to 64 ASCII letters, digits and _, a letter first",
    "too_short": "must have at least {min_length} of them",
    "too_long": "may have at most {max_length} of them",
    "literal_error": "must be {expected}",
}


def describe_mistake(errors: Sequence[Mapping[str, Any]], sent: object) -> tuple[str, str | None]:
    """One line about the first mistake in `errors` (pydantic's), and the name of the field as the user wrote it.

    `sent` is what the user sent: pydantic's places also name members of unions, which no user has written.
    """
    if errors[0]["type"] == "json_invalid":
        return f"the body is not JSON: {errors[0]['ctx']['error']}", None
    if isinstance(sent, bytes):
        return "the body must be a JSON object, sent with Content-Type: application/json", None
    # of a union, the member that fits best fails deepest
    places = [_place(error, sent) for error in errors]
    ranks = [(len(place), _rank(error["type"])) for place, error in zip(places, errors, strict=True)]
    place = places[ranks.index(max(ranks))]
    name = name_of(place)
    here = [error for error, other in zip(errors, places, strict=True) if other == place]
    best = max(_rank(error["type"]) for error in here)
    told = _told(name or "the body", [error for error in here if _rank(error["type"]) == best])
    return told, name or None


def name_of(place: Iterable[str | int]) -> str:
    """A place in a body as a user writes it: `items[3].metadata.year`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return "".join(parts).removeprefix(".")[:200]


def _place(error: Mapping[str, Any], sent: object) -> Place:
    loc = error["loc"]
    if loc and loc[0] in ("query", "path", "header"):
        return tuple(loc[1:2])
    found: list[str | int] = []
    here = sent
    for part in loc[1:] if loc[:1] == ("body",) else loc:
        if isinstance(here, dict) and part in here:
            here = here[part]
        elif isinstance(here, list) and isinstance(part, int) and 0 <= part < len(here):
            here = here[part]
        else:
            continue  # a member of a union, not the user's word
        found.append(part)
    if error["type"] == "missing" and loc and loc[-1] != "body" and found[-1:] != [loc[-1]]:
        found.append(loc[-1])
    return tuple(found)


def _rank(kind: str) -> int:
    """How much an error tells: that a value of the right kind is out of bounds, above that its kind is wrong."""
    known = {"missing": 0, "extra_forbidden": 1}
    return known.get(kind, 2 if kind in KINDS else 3 if kind in LIMITS else 4)


def _told(name: str, errors: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with a field; `errors` are of one rank."""
    kind, context = errors[0]["type"], errors[0].get("ctx", {})
    if kind == "missing":
        return f"{name} is missing"
    if kind == "extra_forbidden":
        return f"{name}: there is no such field (/docs lists those that there are)"
    if kind == "literal_error":
        # of a union of constants, all
        expected = dict.fromkeys(str(error["ctx"]["expected"]) for error in errors if error["type"] == kind)
        return f"{name} must be {' or '.join(expected)}"
    if context.get("min_length") == 1 and kind in ("string_too_short", "too_short"):
        return f"{name} must not be empty"
    if errors[0].get("input") != errors[0].get("input"):  # NaN, which is in no limits
        return f"{name} must be a finite number"
    if kind in LIMITS:
        return f"{name} {LIMITS[kind].format(**context)}"
    if kind in KINDS:
        kinds = list(dict.fromkeys(KINDS[error["type"]] for error in errors))
        if "a number" in kinds and "a whole number" in kinds:
            kinds.remove("a whole number")
        *first, last = kinds
        return f"{name} must be {', '.join(first)} or {last}" if first else f"{name} must be {last}"
    # a validator of ours, or a kind of error that no field here has yet
    message = str(context["error"]) if kind == "value_error" else str(errors[0]["msg"])
    field = name.rpartition(".")[2]
    return message if name == "the body" or message.startswith(f"{field} must") else f"{name}: {message}"
