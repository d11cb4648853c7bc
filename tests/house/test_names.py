"""Public names mean one thing: no class or function is defined under the same name in two modules."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("mmwudao", "generation", "retrieval", "vqvae", "data")
# names that a convention gives to one function of many modules
CONVENTIONAL = {
    "main": "the entry point of a module that is run or of a training command",
    "train": "the training run of a configuration, one in each training module",
    "load": "mmwudao.load is the public name of mmwudao.pipeline.load",
}
ENTRY_POINTS = {"command", "callback", "get", "post", "put", "delete", "patch"}  # of typer and FastAPI


def is_entry_point(node: ast.stmt) -> bool:
    """Whether a decorator registers the function as a command or a route, whose name users type and no code calls."""
    decorators = getattr(node, "decorator_list", [])
    functions = [decorator.func for decorator in decorators if isinstance(decorator, ast.Call)]
    return any(isinstance(function, ast.Attribute) and function.attr in ENTRY_POINTS for function in functions)


def public_definitions(text: str) -> list[str]:
    """The public classes and functions at the top level of a module, without commands and routes."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.parse(text).body if isinstance(node, kinds)]
    return [node.name for node in nodes if not node.name.startswith("_") and not is_entry_point(node)]


def test_public_names_are_defined_once() -> None:
    places = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for name in public_definitions(path.read_text(encoding="utf-8")):
                places[name].append(str(path.relative_to(ROOT)))
    repeated = {name: paths for name, paths in places.items() if len(paths) > 1 and name not in CONVENTIONAL}
    assert not repeated, "\n".join(f"{name}: {', '.join(paths)}" for name, paths in sorted(repeated.items()))


def test_definitions_are_recognised() -> None:
    text = "class A: ...\ndef _b(): ...\n@app.command('c')\ndef c(): ...\n@cache\ndef d(): ...\nasync def e(): ...\n"
    assert public_definitions(text) == ["A", "d", "e"]
