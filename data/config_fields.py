"""The fields of a configuration for people: name, type, limits, default and help, read from the dataclasses.

The help of a field is that of its `option(...)`, or the comment in the source behind it or on the lines above it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from typing import Any

from data.options import describe_limits

WIDTH = 100  # columns of help


def describe_config(cls: type[Any]) -> str:
    """Every `section.key=default` of the dataclass `cls`, with its type, limits and help, as text for a terminal."""
    return "\n".join(_lines(cls(), ""))


def _lines(config: Any, prefix: str) -> Iterator[str]:
    hints, comments = typing.get_type_hints(type(config)), _comments(type(config))
    sections = []
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            sections.append((field.name, value))
            continue
        yield f"{prefix}{field.name}={_shown(value)}  ({_kind(hints[field.name])}{describe_limits(field)})"
        text = field.metadata.get("help") or comments.get(field.name, "")
        yield from textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")
    for name, section in sections:  # behind the plain fields, which would look like its own
        yield ""
        summary = (inspect.getdoc(type(section)) or "").partition("\n\n")[0]
        if summary.startswith(f"{type(section).__name__}("):  # what `dataclass` writes where there is no docstring
            summary = ""
        yield from textwrap.wrap(f"{prefix}{name}: {summary}", WIDTH)
        yield from _lines(section, f"{prefix}{name}.")


def _shown(value: Any) -> str:
    """A default as an override would give it; text without its quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _kind(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(str(choice) for choice in typing.get_args(hint))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint) or str(hint)


def _comments(cls: type[Any]) -> dict[str, str]:
    """The comments of a dataclass's fields, those of its base classes too; none where there is no source to read."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # made at run time, or installed without source
            continue
        lines = source.splitlines()
        comments: dict[int, str] = {}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                comments[token.start[0]] = token.string.lstrip("# ")
        tree = ast.parse(source).body[0]
        assert isinstance(tree, ast.ClassDef)
        for node in tree.body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            above = node.lineno - 1
            while above in comments and lines[above - 1].lstrip().startswith("#"):
                above -= 1
            numbers = [*range(above + 1, node.lineno), node.end_lineno or node.lineno]
            text = " ".join(comments[number] for number in numbers if number in comments)
            if text:
                found[node.target.id] = text
    return found
