"""The commands of docs/distributed.md that run on one machine, at a size that takes seconds."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data.config import to_dict
from tests.helpers.tiny_codes import logged, make_config, write_workspace

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
SECTIONS = {title: text for title, _, text in (part.partition("\n") for part in PAGE.split("\n## "))}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def page_commands(section: str) -> list[list[str]]:
    """The words of each command in the blocks of a section."""
    blocks = re.findall(r"^```\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def test_the_page_shows_commands() -> None:
    assert len(page_commands("One machine")) == 5
    assert len(page_commands("Stopping and going on")) == 2
    assert len(page_commands("Experts")) == 4


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    write_workspace(workspace)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(make_config(workspace, tmp_path / "run"))))))
    losses = []
    for number, words in enumerate([*page_commands("One machine"), *page_commands("Stopping and going on")]):
        goes_on = "--resume" in words
        out = tmp_path / ("4" if goes_on else str(number))  # what four processes wrote, two and then one go on with
        changes = [f"loop.out={out}", f"loop.steps={2 * number if goes_on else 4}", "loop.eval_every=2"]
        line = [str(path) if word == "CONFIG" else word for word in words]
        line = [*TORCHRUN, *line[1:]] if line[0] == "torchrun" else [sys.executable, "-m", *line]
        done = subprocess.run(
            [*line, *changes], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stderr[-3000:])
        assert (out / "generator" / "config.json").is_file()
        losses.append(logged(out, "train/loss"))
    for other in losses[1:5]:
        assert other == pytest.approx(losses[0], rel=1e-5)
    assert [len(one) for one in losses[5:]] == [10, 12]


@pytest.mark.slow
def test_the_commands_of_experts_run(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    write_workspace(workspace)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(make_config(workspace, tmp_path / "run"))))))
    dense = tmp_path / "dense"
    lines = [["mmwudao", "train", "generator", "CONFIG"], *page_commands("Experts")]
    for number, words in enumerate(lines):
        out = tmp_path / str(number) if number else dense
        line = [str(path) if word == "CONFIG" else word.replace("DENSE", str(dense / "generator")) for word in words]
        line = [*TORCHRUN, *line[1:]] if line[0] == "torchrun" else [sys.executable, "-m", *line]
        done = subprocess.run(
            [*line, f"loop.out={out}", "loop.steps=2", "loop.eval_every=2"], cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stderr[-3000:])
        stored = json.loads((out / "generator" / "config.json").read_text())
        assert ("experts" in stored) == (number > 0)
