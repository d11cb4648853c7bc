"""docs/operators.md: its tables are the service's own limits and metrics, and its commands about snapshots run."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from mmwudao.cli.app import run
from mmwudao.service.metrics import Metrics
from mmwudao.service.settings import ServiceConfig
from retrieval.collections.opening import open_collection

PAGE = (Path(__file__).parents[2] / "docs" / "operators.md").read_text(encoding="utf-8")
OTHER_OPTIONS = {"keys", "allow_urls", "log_prompts", "cors"}  # which bound nothing


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## )", PAGE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def test_the_table_of_limits_is_that_of_the_service() -> None:
    shown: dict[str, float] = {}
    for names, values in re.findall(r"^\| (`.*?`) \| ([\d., ]+) \|", section("Limits"), re.MULTILINE):
        shown |= dict(zip(re.findall(r"`(\w+)`", names), map(float, values.split(",")), strict=True))
    assert shown == {one.name: one.default for one in fields(ServiceConfig) if one.name not in OTHER_OPTIONS}


def test_the_table_of_metrics_is_that_of_the_service() -> None:
    families = Metrics().registry.collect()
    names = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert set(re.findall(r"^\| `(\w+)` \|", section("Metrics"), re.MULTILINE)) == names


def test_the_commands_of_snapshots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = re.findall(r"^mmwudao (index snapshots .*?)(?:  #.*)?$", section("The collection"), re.MULTILINE)
    assert len(commands) == 3
    monkeypatch.chdir(tmp_path)
    open_collection("pictures", create=True, dim=8).close()
    for command in commands:
        assert run(command.split()) == 0
        assert "before-the-import" in capsys.readouterr().out
