"""The house: packaging, constraints, the one way that imports run, and the size of files."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mmwudao

ROOT = Path(__file__).parents[2]
# who may import whom: each package itself and what stands after it
LAYERS = {
    "mmwudao": {"generation", "retrieval", "vqvae", "data"},
    "generation": {"vqvae", "data"},
    "retrieval": {"vqvae", "data"},
    "vqvae": {"data"},
    "data": set(),
}
SOURCES = sorted(path for package in LAYERS for path in (ROOT / package).rglob("*.py"))


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


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
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_every_requirement_is_pinned(setup: configparser.ConfigParser) -> None:
    lines = [line for line in words((ROOT / "constraints.txt").read_text()) if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", line) for line in lines), "names and versions only"
    pinned = {distribution(line) for line in lines}
    extras = setup["options.extras_require"]
    wanted = words(setup["options"]["install_requires"]) + words(extras["test"]) + words(extras["lint"])
    assert {distribution(requirement) for requirement in wanted} <= pinned


def test_every_import_is_required(setup: configparser.ConfigParser) -> None:
    """What the packages import from outside is what install_requires, or the extra of a backend, says."""
    names = {
        "pillow": "PIL", "pyyaml": "yaml", "huggingface-hub": "huggingface_hub", "resvg-py": "resvg_py",
        "open-clip-torch": "open_clip", "prometheus-client": "prometheus_client", "lance-ray": "lance_ray",
        "grpcio": "grpc", "fastapi-offline": "fastapi_offline",
    }  # fmt: skip
    extras = setup["options.extras_require"]
    wanted = words(setup["options"]["install_requires"]) + words(extras["milvus"]) + words(extras["ray"])
    wanted += words(extras["int8"]) + words(extras["gpu"])
    required = {distribution(requirement) for requirement in wanted}
    known = {names.get(name, name) for name in required} | set(LAYERS) | set(sys.stdlib_module_names)
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                assert module.partition(".")[0] in known, f"{path.name} imports {module}"


def test_metadata(setup: configparser.ConfigParser) -> None:
    assert setup["metadata"]["version"] == "attr: mmwudao.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", mmwudao.__version__)
    assert setup["metadata"]["license"] == "Apache-2.0"
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert setup["options"]["python_requires"] == ">=3.11"
    assert "mmwudao = mmwudao.__main__:main" in setup["options.entry_points"]["console_scripts"]
    tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_of_ours_is_installed(setup: configparser.ConfigParser) -> None:
    from setuptools import find_packages

    include = words(setup["options.packages.find"]["include"])
    found = set(find_packages(str(ROOT), include=include))
    folders = {path.parent.relative_to(ROOT) for package in LAYERS for path in (ROOT / package).rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == found


@pytest.mark.parametrize("target", ["install", "demo", "test", "test-slow", "lint", "bench", "gpu-bench", "gpu-check"])
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


def test_ci_runs_lint_and_test() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert "make lint\nmake test\n" in text
