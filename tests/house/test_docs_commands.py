"""README.md and docs/*.md: each command exists with its options, the quick ones run, each link leads somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from mmwudao.cli.app import app, run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "mmwudao/models/emoji/README.md"]
PAGES += [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "LOG.md"]  # the log tells of the past
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)(#[^)]*)?\)")
PATH_IN_CODE = re.compile(r"`((?:data|vqvae|generation|retrieval|mmwudao|bench|tests|docs)/[\w./-]*)`")


def commands(page: Path) -> list[str]:
    """The lines of a page's blocks that call mmwudao, continued lines joined, without what follows a `#`."""
    text = "\n".join(BLOCK.findall(page.read_text(encoding="utf-8"))).replace("\\\n", " ")
    calls = re.findall(r"^(?:\.venv/bin/|torchrun .* -m )?mmwudao [^\n|>]*", text, re.MULTILINE)
    found = [part.strip() for line in calls for part in line.split("; ")]
    return [line[line.index("mmwudao ") + 8 :] for line in found if "mmwudao " in line]


def words(line: str) -> list[str]:
    return [word.removesuffix("...") for word in shlex.split(line, comments=True) if word not in ("...", "\\")]


CALLS = [(page, line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), CALLS, ids=lambda value: value.name if isinstance(value, Path) else value)
def test_a_command_of_the_pages_can_be_parsed(page: Path, line: str) -> None:
    command: Any = typer.main.get_command(app)
    arguments = words(line)
    while hasattr(command, "commands"):
        name = arguments.pop(0)
        assert "|" in name or name in command.commands, f"{page.name}: there is no command {name!r}"
        command = command.commands[name.partition("|")[0]]
    command.make_context(command.name, arguments)  # raises for an option that is not there, or an argument too many


def test_pages_hold_commands() -> None:
    assert len(CALLS) > 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    Image.new("RGB", (128, 128), "red").save(folder / "PICTURE.png")
    (folder / "SHARDS").symlink_to(ROOT / "data" / "samples" / "emoji")
    return folder


# what the pages show, at the size that takes seconds: the words of the page on the left, those of the test on the right
QUICK = {"shards/emoji": "SHARDS", "-n 8": "-n 1", "PICTURE": "PICTURE.png", "--language all": "--language de"}


@pytest.mark.parametrize(
    "start",
    ["generate", "caption", "index build shards", "search pictures", "info emoji", "rerank", "complete", "upscale"],
)
def test_the_quick_commands_run(start: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of each in the README, else in a page."""
    monkeypatch.chdir(folder)
    if start.startswith("search") and not (folder / "pictures").exists():  # the collection that it searches
        assert run(quick_words("index build shards")) == 0
    line = quick_words(start)
    assert run(line) == 0, line


def quick_words(start: str) -> list[str]:
    """The first call that begins with `start`, at the size that takes seconds."""
    line = next(line for _, line in CALLS if line.startswith(start)).partition(" #")[0]
    for shown, quick in QUICK.items():
        line = line.replace(shown, quick)
    return words(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, _ in LINK.findall(text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in set(PATH_IN_CODE.findall(text)) - {"bench/results/gpu.json"}:  # written where there is a GPU
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for module in re.findall(r"python -m\s+(bench\.[\w.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{page.name} calls {module}"


SCRIPTS = sorted((ROOT / "bench").glob("*/*.py"))


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda page: page.name)
def test_benches_are_called_as_modules(page: Path) -> None:
    """A script alone does not find the package `bench`, from which some of them import."""
    assert not re.findall(r"python\s+bench/\w+/", page.read_text(encoding="utf-8"))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 600
