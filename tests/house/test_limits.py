"""Every number of every configuration has limits, at its field, which are checked when one is made."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any, TypeGuard

import pytest

from data.options import check_options, describe_limits, full_help, number_kind, option, within

ROOT = Path(__file__).parents[2]
PACKAGES = ("data", "vqvae", "generation", "retrieval", "mmwudao")
NAMES = ("Config", "Options", "Settings", "Limits", "Mix", "Sizes", "Import")
# made by the program alone from the limits of `ServiceConfig`, or at run time
INTERNAL = {"BatchLimits", "BatchSettings"}
# what has no default, for the classes that need it
REQUIRED = {"image_size": 64, "splits": ("test",), "name": "x", "style": "x", "method": "both", "alpha": 8.0}
REQUIRED |= {"kind": "t5", "width": 8}
REQUIRED |= {"generator": "x", "weights": "x", "styles": (), "languages": (), "default_sampling": None, "parts": {}}


def configurations() -> list[type[Any]]:
    """The dataclasses of settings in all packages: by their names, or by a field made by `option`."""
    found = []
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        names = [node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if _is_configuration(node)]
        if names:  # no other module is imported: some are slow
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            found += [getattr(module, name) for name in names]
    return found


def _is_configuration(node: ast.stmt) -> TypeGuard[ast.ClassDef]:
    if not isinstance(node, ast.ClassDef) or node.name in INTERNAL:
        return False
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return False
    values = [ast.unparse(one.value) for one in node.body if isinstance(one, ast.AnnAssign) and one.value is not None]
    return node.name.endswith(NAMES) or any(value.startswith("option(") for value in values)


def numbers(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init and number_kind(field)]


def test_every_number_has_limits():
    classes = configurations()
    assert len(classes) > 25
    bare = [
        f"{cls.__module__}.{cls.__name__}.{field.name}"
        for cls in classes
        for field in numbers(cls)
        if "help" not in field.metadata or not describe_limits(field) or not field.metadata["help"]
    ]
    assert bare == []


def test_limits_are_checked_when_a_configuration_is_made():
    unchecked = []
    for cls in configurations():
        given = {f.name: REQUIRED[f.name] for f in dataclasses.fields(cls) if f.init and f.name in REQUIRED}
        given = {name: value for name, value in given.items() if cls.__dataclass_fields__[name].default is _NONE}
        for field in numbers(cls):
            value: Any = next(v for v in (-(10**30), 10**30) if not within(field, v))
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if isinstance(default, list | tuple):
                value = type(default)([value] * max(1, len(default)))
            try:
                cls(**given | {field.name: value})
            except ValueError as error:
                if field.name not in str(error):
                    unchecked.append(f"{cls.__name__}.{field.name}: {error}")
                continue
            unchecked.append(f"{cls.__name__}.{field.name}")
    assert unchecked == []


_NONE = dataclasses.MISSING


@dataclasses.dataclass
class _Example:
    share: float = option(0.5, "A share.", least=0, below=1)
    sizes: list[int] = option([1, 2], "Sizes.", least=1, most=8)
    rest: int | None = option(None, "The rest.", least=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 1}, "share must be a number of at least 0 and below 1, not 1"),
        ({"share": float("nan")}, "share must be a number"),
        ({"sizes": [1, 9]}, "sizes must hold numbers, each a whole number from 1 to 8, not [1, 9]"),
        ({"sizes": [1.5]}, "sizes must hold numbers"),
        ({"rest": 0}, "rest must be a whole number of at least 1, not 0"),
        ({"rest": True}, "rest must be a whole number"),
    ],
)
def test_messages(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_options(_Example(**values))


def test_help_states_the_limits():
    fields = {field.name: full_help(field) for field in dataclasses.fields(_Example)}
    assert fields == {
        "share": "A share. (a number of at least 0 and below 1)",
        "sizes": "Sizes. (a whole number from 1 to 8)",
        "rest": "The rest. (a whole number of at least 1)",
    }
