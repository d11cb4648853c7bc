"""The house: packaging, constraints, the one way that imports run, and the size of files."""

from __future__ import annotations

import ast
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmwudao.cli.extras import EXTRA_OF

ROOT = Path(__file__).parents[2]
# who may import whom: each package itself and what stands after it
LAYERS = {
    "mmwudao": {"generation", "retrieval", "vqvae", "data"},
    "generation": {"vqvae", "data"},
    "retrieval": {"vqvae", "data"},
    "vqvae": {"data"},
    "data": set(),
}
MOST_LINES, MOST_FUNCTION_LINES = 400, 60
SOURCES = sorted(path for package in LAYERS for path in (ROOT / package).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def imported_modules(path: Path) -> set[str]:
    """The modules that a file imports when it runs, by dotted name; of `from a import b`, both a and a.b."""
    found: set[str] = set()

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(inside)
            if not inside <= MODULES:  # a package whose modules are imported from it gives nothing of its own
                found.add(node.module or "")
        for child in ast.iter_child_nodes(node):
            look(child)

    look(ast.parse(path.read_text(encoding="utf-8")))
    return found


def requirements(setup: configparser.ConfigParser, extra: str) -> set[str]:
    """The distributions of an extra, with those of the extras it names; "" is the base install."""
    found = set()
    lines = words(setup["options.extras_require"][extra] if extra else setup["options"]["install_requires"])
    for line in lines:
        if line.startswith("mmwudao["):
            for other in line.removeprefix("mmwudao[").rstrip("]").split(","):
                found |= requirements(setup, other)
        else:
            found.add(distribution(line))
    return found


def words(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines() if line.strip()]


def distribution(requirement: str) -> str:
    """The normalised name in a line such as `huggingface_hub>=0.30`."""
    match = re.match(r"[\w.-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "packages are imported by their own names"
            imported.add((node.module or "").partition(".")[0])
    wrong = imported & set(LAYERS) - {package} - LAYERS[package]
    assert not wrong, f"{package} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_no_two_modules_import_each_other() -> None:
    """No circle of imports, not even one that a function's own import closes; `TYPE_CHECKING` does not count."""
    names = {
        path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES
    }
    known = set(names.values())
    imports = {name: imported_modules(path) & known - {name} for path, name in names.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(imports[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in sorted(imports):
        visit(name, ())


def test_every_requirement_is_pinned(setup: configparser.ConfigParser) -> None:
    lines = [line for line in words((ROOT / "constraints.txt").read_text()) if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", line) for line in lines), "names and versions only"
    pinned = {distribution(line) for line in lines}
    assert requirements(setup, "") | requirements(setup, "dev") <= pinned


# a distribution's import name, where it is another
IMPORT_NAMES = {
    "pillow": "PIL", "pyyaml": "yaml", "huggingface-hub": "huggingface_hub", "resvg-py": "resvg_py",
    "open-clip-torch": "open_clip", "prometheus-client": "prometheus_client", "lance-ray": "lance_ray",
    "grpcio": "grpc", "fastapi-offline": "fastapi_offline",
}  # fmt: skip


def test_every_import_is_required(setup: configparser.ConfigParser) -> None:
    """What the packages import from outside is in install_requires, or in the extra that the command line names."""
    base = {IMPORT_NAMES.get(name, name) for name in requirements(setup, "")}
    own = set(LAYERS) | set(sys.stdlib_module_names)
    for path in SOURCES:
        for module in imported_modules(path):
            top = module.partition(".")[0]
            assert top in base | own | set(EXTRA_OF), f"{path.name} imports {module}"
    for module, extra in EXTRA_OF.items():
        installed = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in requirements(setup, extra)}
        assert module in installed | {"lance", "multipart"}, f"mmwudao[{extra}] does not install {module}"


HEAVY = (
    "lancedb", "pyarrow", "fastapi", "gradio", "ray", "onnxruntime", "matplotlib", "tensorboard", "peft", "torchao",
)  # fmt: skip
BASE_COMMANDS = [
    ["--help"],
    ["generate", "red heart", "-o", "{out}/drawn", "--candidates", "2", "--rerank", "both"],
    ["info", "emoji"],
    ["data", "stats", "{samples}"],
    ["tokenize", "{samples}", "-o", "{out}/codes"],
]


# run one after the other in one process, so none may import what a later one has to miss
EXTRA_COMMANDS = [
    ("pyarrow", "search", ["search", "nowhere", "a cat"]),
    ("lancedb", "search", ["index", "build", "data/samples/emoji", "--collection", "{out}/c"]),
    ("imagehash", "clean", ["data", "leaks", "data/samples/emoji"]),
    ("phonenumbers", "clean", ["data", "clean", "data/samples/emoji", "-o", "{out}/clean"]),
    ("resvg_py", "train", ["data", "build", "emoji", "-o", "{out}/shards", "--limit", "1"]),
    ("onnxruntime", "export", ["export", "onnx", "mmwudao/models/emoji/towers", "-o", "{out}/onnx"]),
    ("fastapi", "serve", ["serve", "--port", "0"]),
    ("gradio", "demo", ["demo"]),
]
# runs [[absent modules, arguments], ...] in a process in which they are not installed, as far as it can tell
WITHOUT = """
import contextlib, io, json, sys
absent = []
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition('.')[0] in absent else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from mmwudao.cli.app import run
ended = []
for absent, arguments in json.loads(sys.argv[1]):
    there = sorted(set(absent) & set(sys.modules))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        ended.append([run(arguments), said.getvalue(), there])
print(json.dumps(ended))
"""


def run_without(calls: list[tuple[list[str], list[str]]]) -> list[tuple[int, str, list[str]]]:
    """Of each call the exit code, what it said on stderr, and which of the absent modules were there all the same."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(calls)], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return [(code, said, there) for code, said, there in json.loads(done.stdout.splitlines()[-1])]


def test_the_base_install_is_enough(tmp_path: Path) -> None:
    samples = str(ROOT / "data" / "samples" / "emoji")
    calls = [[word.format(out=tmp_path, samples=samples) for word in arguments] for arguments in BASE_COMMANDS]
    for call, (code, said, there) in zip(calls, run_without([(list(HEAVY), call) for call in calls]), strict=True):
        assert (code, there) == (0, []), f"{call}: {said}"


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    calls = [([module], [word.format(out=tmp_path) for word in call]) for module, _, call in EXTRA_COMMANDS]
    for (module, extra, _), (code, said, there) in zip(EXTRA_COMMANDS, run_without(calls), strict=True):
        assert (code, there) == (2, []), f"{module}: {said}"
        assert said.splitlines()[-1].endswith(f"pip install 'mmwudao[{extra}]'"), module
        assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_every_package_of_ours_is_installed(setup: configparser.ConfigParser) -> None:
    from setuptools import find_packages

    include = words(setup["options.packages.find"]["include"])
    found = set(find_packages(str(ROOT), include=include))
    folders = {path.parent.relative_to(ROOT) for package in LAYERS for path in (ROOT / package).rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == found


@pytest.mark.parametrize(
    "target", ["install", "demo", "test", "test-slow", "check", "lint", "bench", "gpu-bench", "gpu-check"]
)
def test_make_targets_exist(target: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "-c constraints.txt" in done.stdout, "every target installs first"


def test_make_names_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    old.write_text(
        "#!/bin/sh\n"
        f'exec "{sys.executable}" -c "import sys; sys.version_info = (3, 9, 1); exec(sys.argv[1])" "$2"\n'
    )
    old.chmod(0o755)
    done = subprocess.run(
        ["make", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}", "install"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert f"error: mmwudao needs Python 3.11 or newer, and {old} is 3.9" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_json_and_yaml_are_parsed_in_one_place():
    """Elsewhere a file of a hundred thousand brackets would end in the parser's own error."""
    found = {
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and re.match(r"json\.loads?\((?!json\.dumps)|yaml\.\w*load\w*\(", ast.unparse(node))
    }
    assert {place.partition(":")[0] for place in found} == {"data/records.py"}
