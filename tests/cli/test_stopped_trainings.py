"""Every training that Ctrl-C or SIGTERM stops saves first; resumed, it ends with the weights of a whole one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.config import to_dict
from data.shards import file_sha256
from mmwudao.cli.app import run
from tests.generation.test_adapters import base_dir, codes, style_config
from tests.helpers.stripes import stripe_shards, train_config
from tests.helpers.tiny_codes import make_config, write_workspace
from tests.retrieval.test_train_retrieval import make_config as towers_config
from tests.retrieval.test_train_retrieval import workspace as discs
from tests.retrieval.test_train_text_encoder import config_of as text_encoder_config
from tests.retrieval.test_train_text_encoder import workspace as texts
from tests.vqvae.test_upscaler import train_config as upscaler_config
from vqvae.training.loop import Loop

__all__ = ["base_dir", "codes", "discs", "texts"]  # fixtures
ROOT = Path(__file__).parents[2]
KINDS = ("tokenizer", "generator", "style", "upscaler", "retrieval", "text-encoder")
SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
Start = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """Ctrl-C is heard, even where the tests run in the background of a script, for which it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def configs(base_dir, codes, discs, texts, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("stopped")
    shards = stripe_shards(folder / "stripes")
    workspace = folder / "workspace"
    workspace.mkdir()
    nowhere = Path()
    upscaler = upscaler_config(shards, nowhere, image_size=16, crop=8, exclude_families=[])
    return {
        "tokenizer": train_config(shards, nowhere),
        "generator": make_config(write_workspace(workspace), nowhere, model={"dropout": 0.1}),
        "style": replace(style_config(codes, nowhere, {"method": "both"}), base=str(base_dir)),
        "upscaler": upscaler,
        "retrieval": towers_config(discs, nowhere),
        "text-encoder": text_encoder_config(texts, nowhere),
    }


@pytest.fixture
def start(configs, tmp_path) -> Start:
    """The arguments of a training of some steps in a folder, which it writes the settings for."""

    def arguments(kind: str, out: Path, steps: int, *more: str) -> list[str]:
        loop = {"steps": steps, "log_every": 1, "eval_every": 10**6, "save_every": 10**6, "ema": 0.8}
        config = replace(configs[kind], loop=replace(configs[kind].loop, out=str(out), **loop))
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(config)))))
        return ["train", kind, str(tmp_path / "config.yaml"), *more]

    return arguments


def part(out: Path, kind: str) -> Path:
    return out / {"retrieval": "towers", "style": "adapter"}.get(kind, kind)


def weights(out: Path, kind: str) -> str:
    return file_sha256(next(part(out, kind).glob("*.safetensors")))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("style", "retrieval"))) for kind in KINDS]
)
def test_a_training_that_was_stopped_twice_is_the_whole_one(kind, start, tmp_path, capsys, monkeypatch):
    assert run(start(kind, tmp_path / "whole", 7)) == 0
    step = Loop._step
    for at, (number, code, line) in zip((2, 4), SIGNALS, strict=True):

        def stopped(self: Loop, place: int, at: int = at, number: int = number) -> dict[str, float]:
            if place == at:
                signal.raise_signal(number)
            return step(self, place)

        monkeypatch.setattr(Loop, "_step", stopped)
        capsys.readouterr()
        more = ["--resume"] if at > 2 else []
        assert run(start(kind, tmp_path / "parts", 7, *more)) == code
        assert capsys.readouterr().err.splitlines()[-1] == line
        name = (tmp_path / "parts" / "checkpoints" / "latest").read_text()
        assert int(name.partition("-")[0]) == at + 1, "the step in which the signal came is finished"
        assert not part(tmp_path / "parts", kind).exists()
    monkeypatch.setattr(Loop, "_step", step)
    assert run(start(kind, tmp_path / "parts", 7, "--resume")) == 0
    assert weights(tmp_path / "parts", kind) == weights(tmp_path / "whole", kind)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("number", "code", "line"), SIGNALS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_process_that_is_stopped(kind, number, code, line, start, tmp_path):
    steps = 60
    out = tmp_path / "parts"
    process = subprocess.Popen(
        [sys.executable, "-m", "mmwudao", *start(kind, out, steps)], cwd=ROOT, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    while not (out / "log.jsonl").is_file() or not (out / "log.jsonl").read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    error = process.stderr.read()
    assert process.wait() == code, error
    assert error.splitlines() == [line]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert not list(out.rglob("*.part"))
    assert run(start(kind, out, steps, "--resume")) == 0
    assert run(start(kind, tmp_path / "whole", steps)) == 0
    assert weights(out, kind) == weights(tmp_path / "whole", kind)
