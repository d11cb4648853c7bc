"""A training that is asked to stop saves first, and the run goes on from there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from data.config import to_dict
from tests.helpers.tiny_codes import logged, make_config, write_workspace
from vqvae.training.lease import Lease

ROOT = Path(__file__).parents[2]


def started(tmp_path: Path, processes: int) -> tuple[subprocess.Popen[str], Path]:
    """A training in a process group of its own, after its third step, and its folder."""
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    write_workspace(workspace)
    out = tmp_path / "run"
    config = make_config(workspace, out, steps=100_000, log_every=1, eval_every=10**6, save_every=10**6)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(config)))))
    arguments = ["-m", "mmwudao", "train", "generator", str(tmp_path / "config.yaml")]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
    process = subprocess.Popen(
        [sys.executable, *launch, *arguments], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not (out / "log.jsonl").is_file() or len(logged(out, "train/loss")) < 3:
        assert process.poll() is None
        time.sleep(0.1)
    return process, out


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_and_leaves_with_143(tmp_path, processes):
    process, out = started(tmp_path, processes)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    error = process.stderr.read()
    code = process.wait()
    if processes == 1:
        assert code == 143, error
        assert error.splitlines()[-1] == "terminated"
    steps = len(logged(out, "train/loss"))
    name = (out / "checkpoints" / "latest").read_text()
    # the step in which the signal came is finished and saved, but not logged
    assert int(name.partition("-")[0]) in (steps, steps + 1)
    assert not list((out / "checkpoints").glob("*.part"))
    assert not (out / "generator").exists(), "a part is what is saved at the end"
    lease = Lease(out / "checkpoints", patience=1000)
    lease.claim()  # at once: the run has left
    lease.release()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_ends_all_processes_and_makes_room(tmp_path, processes):
    process, out = started(tmp_path, processes)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    assert process.stderr is not None
    error = process.stderr.read()
    code = process.wait()
    if processes == 1:
        assert (code, error.splitlines()[-1]) == (130, "interrupted")
        assert "Traceback" not in error
    assert "interrupted" in error  # torchrun adds an account of its own
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert not list(out.rglob("*.part"))
    assert not (out / "generator").exists()
    lease = Lease(out / "checkpoints", patience=1000)
    lease.claim()
    lease.release()
