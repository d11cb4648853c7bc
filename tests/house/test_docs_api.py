"""docs/api.md: every example is run against a server, and gives what the page shows."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmwudao.service.app import create_app
from mmwudao.service.generators import LocalGenerator
from mmwudao.service.queues import Served
from retrieval.collections.opening import open_collection
from tests.helpers.service_server import png, running, tiny_pipeline
from tests.helpers.tiny_towers import ColourTowers

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
# a block, and the one with what it prints, if that follows at once
EXAMPLE = re.compile(r"^```(bash|python)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
EXAMPLES = EXAMPLE.findall(PAGE)


@pytest.fixture
def address(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of tiny models by the name that the page uses, in a folder with its picture."""
    (tmp_path / "cat.png").write_bytes(png("red"))
    monkeypatch.chdir(tmp_path)
    with open_collection(tmp_path / "pictures", create=True, dim=8) as collection:
        served = Served("emoji", ColourTowers().eval(), LocalGenerator(tiny_pipeline(tiny_model_dir)), collection)
        with running(served) as url:
            yield url


def check(code: str, shown: str, printed: str) -> None:
    pattern = ".*".join(re.escape(part) for part in shown.strip().split("..."))
    assert re.fullmatch(pattern, printed.strip(), re.DOTALL), f"{code}\nprints\n{printed[:2000]}\nand not\n{shown}"


def test_the_python_examples(address: str) -> None:
    names: dict[str, Any] = {}
    for language, code, shown in EXAMPLES:
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(code.replace(ADDRESS, address), "docs/api.md", "exec"), names)
            check(code, shown, printed.getvalue())
    names["client"].close()


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("bash")), reason="no curl or no bash on this machine")
def test_the_curl_examples(address: str) -> None:
    for language, code, shown in EXAMPLES:
        if language == "bash":
            # curl alone takes an error for an answer; here only where the page shows one
            strict = "" if '"error"' in shown else 'curl() { command curl --fail-with-body "$@"; }\n'
            script = f"set -euo pipefail\n{strict}{code.replace(ADDRESS, address)}"
            done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, encoding="utf-8", timeout=300)
            assert done.returncode == 0, f"{code}\n{done.stdout[:2000]}{done.stderr}"
            check(code, shown, done.stdout)


def test_the_page_shows_every_route() -> None:
    """And what each example prints."""
    for path, methods in create_app(Served("emoji", ColourTowers().eval())).openapi()["paths"].items():
        for method in methods:
            place = path.partition("{")[0]
            if method in ("put", "delete"):
                assert f"-X {method.upper()} {ADDRESS}{place}" in PAGE
            else:
                assert place in PAGE
    assert len(EXAMPLES) > 20
    assert all(shown for _, _, shown in EXAMPLES)
    assert PAGE.count("```bash") + PAGE.count("```python") == len(EXAMPLES)


def test_an_example_that_is_wrong_is_noticed() -> None:
    check("print", "a ... c", "a b c\n")
    with pytest.raises(AssertionError, match="prints"):
        check("print", "a ... c", "a b d\n")
