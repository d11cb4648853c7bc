"""The parsers of JSON and YAML: whatever a file holds, they answer a value or a `ValueError`."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from data.clean.config import CleanConfig
from data.config import ConfigError, from_dict, load_config
from data.records import MAX_DEPTH, parse_json, parse_yaml

HOSTILE = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{now}: &{now} [{','.join([f'*{before}'] * 9)}]\n" for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)


@dataclass
class Settings:
    options: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":'])
@pytest.mark.parametrize("count", [MAX_DEPTH + 1, 950, 100_000])
def test_json_that_is_nested_too_deep(opening: str, count: int) -> None:
    closing = {"[": "]", '{"a":': "}", '[{"a":': "}]"}[opening]
    for text in (opening * count + "1" + closing * count, opening * count):
        for content in (text, text.encode()):
            with pytest.raises(ValueError, match="nested more than 100 deep" if text.endswith(closing) else ""):
                parse_json(content)


def test_json_as_deep_as_it_may_be() -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_json(b"\xef\xbb\xbf" + b"[[]]" * 1) == [[]]
    assert len(parse_json("[" + ",".join(["[1]"] * 1000) + "]")) == 1000


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "nested more than 100 deep"),
        ("[" * 101 + "]" * 101, "nested more than 100 deep"),
        ("- " * 150 + "x", "nested more than 100 deep"),
        ("a: &a [1, *a]", "nested more than 100 deep"),
        (HOSTILE, "more than 1,000,000 values, with aliases"),
        ("a: 1\na: 2", "'a' is given twice"),
        *((tagged, "a tag .* does not fit") for tagged in ("!!float ''", "!!bool x", "!!timestamp x")),
        ("!!map [a]", "a tag .* does not fit"),
        ("a: 2026-13-45", "month must be in"),
        ("\0", "special characters"),
        ("!!python/object:os.system x", "could not determine a constructor"),
    ],
    ids=lambda value: value[:12],
)
def test_yaml_that_is_none(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_yaml(text)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"config.yaml is not YAML: .*{problem}") as caught:
        load_config(Settings, tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)


def test_aliases_and_merges_are_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 1e-3}") == {"a": {"x": 1}, "b": {"x": 1, "y": 0.001}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("08", 8), ("1_000", 1000), ("0x1F", 31), ("0o17", 15), ("-5", -5), ("+5", 5), ("1:30", "1:30"),
        ("1:30.5", "1:30.5"), ("1e3", 1000.0), ("1e-3", 0.001), ("1.5e+2", 150.0), (".5", 0.5), ("1.", 1.0),
        ("-.inf", -math.inf), ("1-2", "1-2"), ("1.2.3", "1.2.3"), ("yes", True), ("off", False), ("true", True),
        ("~", None), ("-", [None]),
        ("2026-11-27", datetime.date(2026, 11, 27)), ("16:9", "16:9"), ("e5", "e5"), ("1e", "1e"), ("'010'", "010"),
    ],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


def test_keys_are_text() -> None:
    """In YAML 1.1 `on` is true, so that no file could switch a filter of `data clean` off."""
    text = "a: &a {on: false, no: 1}\nb: {<<: *a, 2026-11-27: x, 1: y, ~: z, =: w}"
    merged = {"on": False, "no": 1, "2026-11-27": "x", "1": "y", "~": "z", "=": "w"}
    assert parse_yaml(text) == {"a": {"on": False, "no": 1}, "b": merged}
    with pytest.raises(ValueError, match="'on' is given twice"):
        parse_yaml("on: 1\non: 2")


def test_a_file_switches_a_filter_off(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("words:\n  on: false\n")
    assert not load_config(CleanConfig, tmp_path / "config.yaml").words.on


def test_a_key_that_is_no_text() -> None:
    with pytest.raises(ConfigError, match="keys must be str.* not date"):
        from_dict(Settings, {"options": {datetime.date(2026, 11, 27): "x"}})


def test_an_override_of_a_value_s_part_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("options: 3")
    with pytest.raises(ConfigError, match="options.a: 'options' is a value, not a section"):
        load_config(Settings, tmp_path / "config.yaml", ["options.a=1"])
