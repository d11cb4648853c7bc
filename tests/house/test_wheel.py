"""The wheel: what it holds, and that it draws from a folder of its own where nothing of the checkout can be found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of what git tracks: the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True)
    names = [name for name in listed.stdout.decode().split("\0") if name and not name.startswith(("tests/", "docs/"))]
    for name in names:
        if (ROOT / name).is_file():  # not one that has just been removed
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*pip, str(folder), str(folder / "source")], check=True)
    return next(folder.glob("mmwudao-*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path) -> Path:
    """The interpreter of an environment that holds the wheel; the libraries are those of this environment."""
    folder = wheel.parent / "environment"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    with zipfile.ZipFile(wheel) as archive:  # the format's own way to install: unpack into site-packages
        archive.extractall(site)
    libraries = sysconfig.get_path("purelib")
    # appended, without the .pth file that makes the checkout importable
    (site / "libraries.pth").write_text(f"import sys; sys.path.append({libraries!r})\n")
    return python


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run([str(python), *arguments], cwd=folder, capture_output=True, text=True, env=environment)


def test_what_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for wanted in (
        "mmwudao/py.typed", "data/py.typed", "mmwudao/configs/emoji-generator.yaml", "mmwudao/demo/page.css",
        "mmwudao/models/emoji/config.json", "retrieval/towers/model_configs/mmwudao-small.json",
        "data/samples/emoji/train-00000.tar",
    ):  # fmt: skip
        assert wanted in names
    assert [name for name in names if name.endswith("text.model")] == ["mmwudao/models/emoji/text.model"]
    assert not [name for name in names if name.startswith(("tests/", "bench/")) or name.endswith("-curves.png")]


def test_the_wheel_draws(python: Path, tmp_path: Path) -> None:
    done = run(python, tmp_path, "-c", "import mmwudao, data; print(mmwudao.__file__); print(data.__file__)")
    assert all(line.startswith(str(python.parents[1])) for line in done.stdout.split()), done.stdout + done.stderr
    done = run(python, tmp_path, "-m", "mmwudao", "generate", "red heart", "--seed", "1", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


@pytest.mark.parametrize("name", ["data.py", "generation/__init__.py"])
def test_a_module_of_the_users_is_named(python: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine = True\n")
    done = run(python, tmp_path, "-c", "import mmwudao")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: mmwudao needs its own package")
    assert str(path) in last
    assert "rename that file or folder" in last


def test_a_plain_folder_of_the_users_does_not_matter(python: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.csv").write_text("a,b\n")
    done = run(python, tmp_path, "-c", "import mmwudao, data.options; print(data.options.__name__)")
    assert done.stdout == "data.options\n", done.stderr
