"""The demo's server and its command: what it gives to whom, and what reaches the model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import socket
from pathlib import Path

import gradio as gr
import pytest

from generation.drawing.sampling import SamplingOptions
from mmwudao.cli.app import run
from mmwudao.demo import app
from mmwudao.demo.words import EN, WORDS, ZH
from mmwudao.pictures import read_recipe
from mmwudao.pipeline import Pipeline, load
from tests.helpers.http import CLIENT


@pytest.fixture(scope="module")
def pipe(tiny_model_dir: Path) -> Pipeline:
    return load(tiny_model_dir, device="cpu", dtype="float32")


@pytest.fixture
def address(pipe, monkeypatch):
    """The page of the tiny model, which has neither towers nor an upscaler, on a real server."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", "set by `opened`")
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with app.opened(pipe) as opened:
        assert opened.library is None
        demo = app.build_page(opened, "zh")
        try:
            yield app.start(demo, "127.0.0.1", port), demo
        finally:
            demo.close(verbose=False)


def test_the_server_serves_what_the_model_can_and_nothing_else(address):
    url, demo = address
    config = CLIENT.get(f"{url}config").json()
    tabs = [one["props"]["label"] for one in config["components"] if one["type"] == "tabitem"]
    assert tabs == [ZH.draw, ZH.caption, ZH.ask, ZH.complete, EN.draw, EN.caption, EN.ask, EN.complete]
    assert [name for _, name, _ in config["pages"]][1:] == ["English"]
    assert config["analytics_enabled"] is False
    assert all(one["api_visibility"] == "private" for one in config["dependencies"])
    assert app.THEME._stylesheets == []
    head, _, _ = CLIENT.get(url).text.partition("<body")
    assert not re.search(r"<(?:script|link)[^>]*(?:src|href)=[\"']?https?://", head)
    for path in ("/etc/passwd", str(Path(__file__)), str(Path(demo.GRADIO_CACHE).parent)):
        assert CLIENT.get(f"{url}gradio_api/file={path}").status_code in (403, 404)


def messages_of(url: str, demo: gr.Blocks, name: str, values: list) -> list[dict]:
    """What the server sends to a page that calls the function `name` with the values of its fields."""
    number = next(k for k, fn in demo.fns.items() if fn.name == name)
    body = {"data": values, "fn_index": number, "session_hash": "x"}
    assert CLIENT.post(f"{url}gradio_api/queue/join", json=body).status_code == 200
    with CLIENT.stream("GET", f"{url}gradio_api/queue/data", params={"session_hash": "x"}) as events:
        return [json.loads(line[5:]) for line in events.iter_lines() if line.startswith("data:")]


def test_the_controls_of_the_page_reach_the_drawing(address, tmp_path):
    url, demo = address
    chosen = SamplingOptions(temperature=0.5, top_k=7, top_p=0.9, min_p=0.01, guidance=1.5, window=3)
    values = ["cat", "", "7", 1, 1, *dataclasses.astuple(chosen)]
    *_, done = [one for one in messages_of(url, demo, "draw", values) if one["msg"] == "process_completed"]
    assert done["success"] is True, done
    drawn = CLIENT.get(f"{url}gradio_api/file={done['output']['data'][3]['value']['path']}")
    path = tmp_path / "picture.png"
    path.write_bytes(drawn.content)
    recipe = read_recipe(path)
    assert recipe["seed"] == 7
    assert {name: recipe[name] for name in dataclasses.asdict(chosen)} == dataclasses.asdict(chosen)


@pytest.mark.parametrize("path", [__file__, "http://127.0.0.1:9/x.png", "../x.png"])
def test_a_client_cannot_name_a_file(address, path):
    url, demo = address
    upload = {"path": path, "meta": {"_type": "gradio.FileData"}}
    messages = messages_of(url, demo, "caption", [upload, ["zh"]])
    (done,) = [message for message in messages if message["msg"] == "process_completed"]
    assert done["success"] is False
    assert "Traceback" not in json.dumps(messages)


def test_the_command_says_what_is_wrong(tiny_model_dir, tmp_path, capsys):
    assert run(["demo", "--model", str(tiny_model_dir), "--collection", str(tmp_path / "none")]) == 2
    assert "has no towers to search a collection with" in capsys.readouterr().err
    assert run(["demo", "--language", "tlh"]) == 2
    assert "'zh', 'en'" in capsys.readouterr().err
    assert run(["demo", "--model", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert set(WORDS) == {"zh", "en"}
