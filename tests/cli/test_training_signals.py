"""A training that is asked to stop saves first, and the run goes on from there."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from data.config import to_dict
from mmwudao.cli.app import run
from tests.helpers.tiny_codes import logged, make_config, write_workspace
from vqvae.training.lease import Lease
from vqvae.training.loop import Loop
from vqvae.training.process import Termination

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """Ctrl-C is heard, even where the tests run in the background of a script, for which it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def started(tmp_path: Path, processes: int) -> tuple[subprocess.Popen[str], Path]:
    """A training in a process group of its own, after its third step, and its folder."""
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    write_workspace(workspace)
    out = tmp_path / "run"
    never = {"eval_every": 10**6, "save_every": 10**6}
    config = make_config(workspace, out, steps=100_000, log_every=1, final_ratio=1.0, **never)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(config)))))
    arguments = ["-m", "mmwudao", "train", "generator", str(tmp_path / "config.yaml")]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--shutdown-timeout", "600"]
    process = subprocess.Popen(
        [sys.executable, *(launch if processes == 2 else []), *arguments], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not (out / "log.jsonl").is_file() or len(logged(out, "train/loss")) < 3:
        assert process.poll() is None
        time.sleep(0.1)
    return process, out


@pytest.mark.parametrize(
    ("number", "code", "line"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_training_that_is_stopped_saves_first(tmp_path, processes, number, code, line):
    process, out = started(tmp_path, processes)
    # a terminal sends Ctrl-C to the group of the command, of which torchrun's processes are not: it sends it on to them
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert process.stderr is not None
    error = process.stderr.read()
    left = process.wait()
    if processes == 1:
        assert (left, error.splitlines()[-1]) == (code, line), error
        assert "Traceback" not in error
    else:
        assert left == 1, "torchrun's own code after a signal"
        assert error.count(line) >= 2, error  # the lines of two processes may run into one another
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    steps = len(logged(out, "train/loss"))
    name = (out / "checkpoints" / "latest").read_text()
    # the step in which the signal came is finished and saved, but not logged
    assert (step := int(name.partition("-")[0])) in (steps, steps + 1)
    assert not list((out / "checkpoints").glob("*.part"))
    assert not (out / "generator").exists(), "a part is what is saved at the end"
    lease = Lease(out / "checkpoints", patience=1000)
    lease.claim()  # at once: the run has left
    lease.release()
    arguments = ["train", "generator", str(tmp_path / "config.yaml"), f"loop.steps={step + 3}"]
    assert run([*arguments, "--resume"]) == 0
    assert (out / "generator").is_dir()
    assert run([*arguments, f"loop.out={tmp_path / 'whole'}"]) == 0
    resumed, whole = (logged(folder, "train/loss")[-3:] for folder in (out, tmp_path / "whole"))
    assert resumed == pytest.approx(whole, rel=1e-4, abs=1e-5)


def test_a_second_ctrl_c_is_obeyed_at_once(tmp_path, monkeypatch, capfd):
    stopped: list[int] = []
    config = make_config(write_workspace(tmp_path), tmp_path / "run")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(config)))))

    def twice(self: Loop, place: int) -> dict[str, float]:
        stopped.append(place)
        signal.raise_signal(signal.SIGINT)
        assert "once more: leaves at once" in capfd.readouterr().err
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one does not return")

    monkeypatch.setattr(Loop, "_step", twice)
    terminal = SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True, fileno=lambda: 2))
    monkeypatch.setattr("vqvae.training.process.sys", terminal)
    assert run(["train", "generator", str(tmp_path / "config.yaml")]) == 130
    assert stopped == [0]
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_was_ignored_stays_so():
    """As of a job that a script starts in the background: Ctrl-C is for the one before it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Termination() as termination:
            signal.raise_signal(signal.SIGINT)
            assert termination.asked == 0
            signal.raise_signal(signal.SIGTERM)
            assert termination.asked == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
