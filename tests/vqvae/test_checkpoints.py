"""What is kept of a run, and going on from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.training import Dropped, Headed, Regression, make_loop, read_log, weights
from vqvae.training.checkpoints import gather_random_states, restore_random_state
from vqvae.training.config import TrainingError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "changes", [{}, {"ema": 0.9}, {"accumulate": 2, "ema": 0.5}, {"optimizer": "muon"}], ids=lambda c: "-".join(c)
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, changes):
    whole = make_loop(tmp_path / "whole", model=Dropped(), **changes)
    whole.run()
    # stopped in step 7, after the checkpoint of step 5
    broken = make_loop(tmp_path / "run", broken={7: float("nan")}, model=Dropped(), **changes)
    with pytest.raises(TrainingError):
        broken.run()
    torch.rand(17)  # the state of the random numbers is that of the checkpoint, not of the process
    resumed = make_loop(tmp_path / "run", model=Dropped(), **changes)
    resumed.run(resume=True)
    assert isinstance(resumed.task.batches, Regression)
    assert resumed.task.batches.steps == list(range(5, 12))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert torch.equal(weights(resumed.averaged), weights(whole.averaged))
    final = [read_log(tmp_path / name)[-1]["step"] for name in ("whole", "run")]
    assert final == [12, 12]


def test_resume_without_a_checkpoint_starts(tmp_path):
    loop = make_loop(tmp_path)
    loop.run(resume=True)
    assert loop.progress.step == 12


def test_resume_of_a_finished_run_does_nothing(tmp_path):
    first = weights(make_loop(tmp_path).run())
    again = make_loop(tmp_path)
    assert torch.equal(weights(again.run(resume=True)), first)
    assert isinstance(again.task.batches, Regression)
    assert again.task.batches.steps == []


def test_a_run_is_not_overwritten(tmp_path):
    make_loop(tmp_path).run()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(TrainingError, match="--resume"):
        make_loop(tmp_path).run()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    loop = make_loop(tmp_path)
    loop.run()
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def fail(state, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        loop._save()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_a_damaged_checkpoint_is_one_line(tmp_path, content):
    make_loop(tmp_path).run()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(TrainingError, match="damaged") as error:
        make_loop(tmp_path).run(resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": nn.Linear(4, 1)}, "another configuration"),
        ({"optimizer": "muon", "model": Headed()}, "another"),
        ({"ema": 0.9}, "no average"),
    ],
)
def test_a_checkpoint_of_other_settings_is_one_line(tmp_path, changes, problem):
    model = Headed() if "optimizer" in changes else None
    make_loop(tmp_path, model=model).run()
    with pytest.raises(TrainingError, match=problem) as error:
        make_loop(tmp_path, **changes).run(resume=True)
    assert "\n" not in str(error.value)


# what is no checkpoint of ours


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state.pop("progress"), "lacks progress"),
        (lambda state: state.pop("optimizers"), "lacks optimizers"),
        (lambda state: state.update(model=torch.zeros(3), random=None), "lacks model, random"),
        (lambda state: state.update(progress={"step": 5}), "lacks progress"),
        (lambda state: state.update(optimizers=[{}]), "optimizers of other parameters"),
        (lambda state: state["optimizers"][0]["param_groups"].pop(), "optimizers of other parameters"),
        (lambda state: state.update(random=torch.zeros(7, dtype=torch.uint8)), "random numbers"),
        (lambda state: state.update(random=[{"cuda": None}]), "random numbers"),
    ],
)
def test_a_partial_checkpoint_is_one_line(tmp_path, change, problem):
    make_loop(tmp_path).run()
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    with pytest.raises(TrainingError, match=problem) as error:
        make_loop(tmp_path).run(resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{"0.weight": torch.zeros(8, 4)}, torch.zeros(3), [1, 2]])
def test_a_foreign_checkpoint_is_one_line(tmp_path, content):
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(TrainingError, match="no checkpoint of a training run") as error:
        make_loop(tmp_path).run(resume=True)
    assert "\n" not in str(error.value)


# random numbers


def test_a_checkpoint_of_before_resumes(tmp_path):
    """Checkpoints once held the CPU's random state of rank 0, and no other."""
    whole = make_loop(tmp_path / "whole", model=Dropped())
    whole.run()
    with pytest.raises(TrainingError):
        make_loop(tmp_path / "run", broken={7: float("nan")}, model=Dropped()).run()
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["random"] = state["random"][0]["cpu"]
    torch.save(state, path)
    torch.rand(17)
    resumed = make_loop(tmp_path / "run", model=Dropped())
    assert torch.equal(weights(resumed.run(resume=True)), weights(whole.model))


def test_a_process_beyond_those_saved_keeps_its_state(monkeypatch):
    states = gather_random_states(torch.device("cpu"))
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    monkeypatch.setattr("vqvae.training.checkpoints.rank", lambda: 1)
    restore_random_state(states, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), expected)
    monkeypatch.setattr("vqvae.training.checkpoints.rank", lambda: 0)
    restore_random_state(states, torch.device("cpu"))
    assert states[0]["cpu"] is not None
    assert torch.equal(torch.get_rng_state(), states[0]["cpu"])


def test_every_process_goes_on_with_its_own_random_numbers(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "-m", "tests.helpers.two_processes", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for found in (first, second):
        assert found["resumed"] == found["whole"]
        assert found["grouped"] == [True, False]
        assert "accumulate x processes = 6" in found["refused"]
    assert first["whole"]["next"] != second["whole"]["next"], "each process draws numbers of its own"
    assert first["whole"]["weights"] == second["whole"]["weights"]
    assert len(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["random"]) == 2
