"""Typed configuration: nested dataclasses, a YAML file, then `key=value` overrides."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, TypeVar

from data.characters import decode_text
from data.records import parse_yaml

T = TypeVar("T")

LATER = {"later": True}  # metadata of a field that is not stored where it has its default: older files have none


class ConfigError(ValueError):
    """A configuration names an unknown key or gives a value of the wrong type; the message names the key."""


def load_config(cls: type[T], path: Path | str | None = None, overrides: typing.Sequence[str] = ()) -> T:
    """An instance of the dataclass `cls` from a YAML file and `section.key=value` overrides (values in YAML).

    Raises `ConfigError` for a missing file, broken YAML, an unknown key or a value of the wrong type.
    """
    record: dict[str, Any] = {}
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"no configuration file at {path}")
        try:
            record = parse_yaml(decode_text(path.read_bytes())) or {}
        except ValueError as error:
            raise ConfigError(f"{path} is not YAML: {error}") from error
        if not isinstance(record, dict):
            raise ConfigError(f"{path} must hold `key: value` pairs")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"an override reads key=value, not {override!r}")
        try:
            parsed = parse_yaml(value)
        except ValueError as error:
            raise ConfigError(f"{key}: {value[:100]!r} is not YAML") from error
        _set(record, key.split("."), parsed, key)
    return from_dict(cls, record)


def from_dict(cls: type[T], record: dict[str, Any]) -> T:
    """Validate plain nested dictionaries against the dataclass `cls`. Raises `ConfigError`."""
    from pydantic import TypeAdapter, ValidationError

    _check_keys(cls, record, "")
    try:
        # strict: lax mode reads "3" and 3.0 as 3, and True as 1; through JSON, where strict mode still takes a list for
        # a tuple
        written = json.dumps(record, default=str)
    except TypeError as error:  # a key that is a date, say
        raise ConfigError(f"the configuration: {error}") from error
    try:
        return TypeAdapter(cls).validate_json(written, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the configuration"
        if first["type"] == "value_error":  # from a __post_init__, which says what was wrong
            raise ConfigError(f"{key}: {first['ctx']['error']}") from error
        raise ConfigError(f"{key}: {first['msg']}, not {first['input']!r}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries of a dataclass instance, ready for JSON or YAML."""
    return dataclasses.asdict(config)


def to_stored(config: Any) -> dict[str, Any]:
    """`to_dict` without the fields marked `LATER` that have their default, so that files stay what they were."""
    record = to_dict(config)
    for field in dataclasses.fields(config):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.metadata.get("later") and getattr(config, field.name) == default:
            del record[field.name]
    return record


def _set(record: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    for part in path[:-1]:
        record = record.setdefault(part, {})
        if not isinstance(record, dict):
            raise ConfigError(f"{key}: {part!r} is a value, not a section")
    record[path[-1]] = value


def _check_keys(cls: Any, record: Any, prefix: str) -> None:
    if not isinstance(record, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'the configuration'}: expected a section of keys, not {record!r}")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    for key, value in record.items():
        if key not in names:
            raise ConfigError(f"unknown key {prefix}{key}; known here: {', '.join(names)}")
        if dataclasses.is_dataclass(hints[key]):
            _check_keys(hints[key], value, f"{prefix}{key}.")
