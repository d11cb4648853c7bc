"""Small packages of the form of npm's, in place of the pinned ones."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from data.recipes.npm import Package


def write_package(folder: Path, name: str, members: Mapping[str, object]) -> Package:
    """A tarball as npm's, in `folder`, of members as text or JSON; returns its pin."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path, content in {"package.json": {"name": name}, **members}.items():
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            data = text.encode()
            info = tarfile.TarInfo(f"package/{path}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    digest = base64.b64encode(hashlib.sha512(buffer.getvalue()).digest()).decode()
    package = Package(name, "1.0.0", f"sha512-{digest}")
    (folder / package.tarball).write_bytes(buffer.getvalue())
    return package


def replace_pins(patch: pytest.MonkeyPatch, pins: Mapping[str, object]) -> None:
    """Let every recipe use these packages, by the name of the constant that pins the real one."""
    for name, module in list(sys.modules.items()):
        if name.startswith("data.recipes."):
            for constant in pins.keys() & vars(module).keys():
                patch.setattr(module, constant, pins[constant])
