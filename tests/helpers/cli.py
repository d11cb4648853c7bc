"""What tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmwudao.cli.app import run


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, with nothing on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def refused_import(kind: str, arguments: list[str], capsys: pytest.CaptureFixture[str], out: Path) -> str:
    """The one line of a refused `import`; nothing may be left of it."""
    assert run(["import", kind, *arguments, "-o", str(out)]) == 2
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
    return one_error(capsys)
