"""What is kept of a run, and going on from it."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint

from tests.helpers.training import (
    Dropped,
    Headed,
    Regression,
    kept,
    kept_tensors,
    make_loop,
    read_log,
    weights,
    write_old,
)
from vqvae.training.checkpoints import FolderCheckpointer
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
    before = files(tmp_path)

    def fail(state, storage_writer, **rest):
        (storage_writer.path / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", fail)
    loop.checkpointer = FolderCheckpointer(tmp_path)
    loop.checkpointer.claim()
    with pytest.raises(TrainingError, match="No space left") as error:
        loop._save()
    loop.checkpointer.release()
    assert "\n" not in str(error.value)
    assert files(tmp_path) == before


def files(out: Path) -> dict[str, bytes]:
    """What lies in the folder of the checkpoints, without leases."""
    paths = [path for path in (out / "checkpoints").rglob("*") if path.is_file() and "lease" not in path.name]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", ["run.json", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("content", [b"", b"text", None])
def test_a_damaged_checkpoint_is_one_line(tmp_path, name, content):
    make_loop(tmp_path).run()
    path = kept(tmp_path) / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2] if content is None else content)
    with pytest.raises(TrainingError, match="damaged") as error:
        make_loop(tmp_path).run(resume=True)
    assert "\n" not in str(error.value)


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    make_loop(tmp_path).run()
    (kept(tmp_path) / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(TrainingError, match="damaged"):
        make_loop(tmp_path).run(resume=True)


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_a_damaged_old_checkpoint_is_one_line(tmp_path, content):
    write_old(make_loop(tmp_path))
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


def test_settings_of_the_optimizer_apply_to_a_resumed_run(tmp_path):
    make_loop(tmp_path, steps=4).run()
    loop = make_loop(tmp_path, steps=6, weight_decay=0.5, betas=(0.5, 0.6))
    loop.run(resume=True)
    groups = loop.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert {tuple(group["betas"]) for group in groups} == {(0.5, 0.6)}


def test_a_run_goes_on_only_with_what_it_was_trained_with(tmp_path):
    first = make_loop(tmp_path, steps=4)
    first.task.origin = {"tokenizer": "a", "text model": "b"}
    first.run()
    for origin, problem in (({"tokenizer": "x"}, "another tokenizer"), ({"tokenizer": "a", "text model": "x"}, "text")):
        loop = make_loop(tmp_path, steps=6)
        loop.task.origin = origin
        with pytest.raises(TrainingError, match=problem) as error:
            loop.run(resume=True)
        assert "\n" not in str(error.value)
    again = make_loop(tmp_path, steps=6)
    again.task.origin = {"tokenizer": "a", "text model": "b", "of a later version": "c"}
    again.run(resume=True)


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tmp_path):
    make_loop(tmp_path, steps=4).run()
    before = files(tmp_path)
    loop = make_loop(tmp_path, steps=6)
    loop.checkpointer.claim()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        loop.checkpointer.save(5, {"model": torch.zeros(10_000)}, {})
        with pytest.raises(TrainingError, match="cannot write .*; the checkpoint before stays") as error:
            loop.checkpointer.check(wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
        loop.checkpointer.release()
    assert "\n" not in str(error.value)
    assert files(tmp_path) == before


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
    loop = make_loop(tmp_path)
    loop.run()
    write_old(loop)
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


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9, "optimizer": "muon"}], ids=lambda c: "-".join(c))
@pytest.mark.parametrize("single", [False, True])
def test_an_old_checkpoint_resumes(tmp_path, single, changes):
    """Once a checkpoint was one file; before that it held the CPU's random state of rank 0, and no other."""
    whole = make_loop(tmp_path / "whole", model=Dropped(), **changes)
    whole.run()
    broken = make_loop(tmp_path / "run", broken={5: float("nan")}, model=Dropped(), **changes)
    with pytest.raises(TrainingError):
        broken.run()
    state = kept_tensors(tmp_path / "run")["random/0/cpu"]
    write_old(broken, random=state if single else [{"cpu": state, "cuda": None}])
    torch.rand(17)
    resumed = make_loop(tmp_path / "run", model=Dropped(), **changes)
    assert torch.equal(weights(resumed.run(resume=True)), weights(whole.averaged))
    assert not (tmp_path / "run" / "checkpoint.pt").exists(), "newer checkpoints have taken its place"
    again = make_loop(tmp_path / "run", model=Dropped(), **changes)
    assert torch.equal(weights(again.run(resume=True)), weights(whole.averaged))


def test_a_process_beyond_those_saved_keeps_its_state(tmp_path, monkeypatch):
    make_loop(tmp_path).run()
    saved = kept_tensors(tmp_path)["random/0/cpu"]
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    monkeypatch.setattr("vqvae.training.state.replica", lambda: 1)
    loop = make_loop(tmp_path)
    torch.manual_seed(5)
    loop.run(resume=True)
    assert torch.equal(torch.get_rng_state(), expected)
    monkeypatch.setattr("vqvae.training.state.replica", lambda: 0)
    loop.run(resume=True)
    assert torch.equal(torch.get_rng_state(), saved)


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
    names = kept_tensors(tmp_path / "run")
    assert {name for name in names if name.startswith("random")} == {"random/0/cpu", "random/1/cpu"}


def test_the_random_state_of_a_gpu_is_kept_too(tmp_path, monkeypatch):
    state = {"cuda": torch.arange(16, dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state["cuda"].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda new, device: state.update(cuda=new))
    loop = make_loop(tmp_path)
    loop.state.device = torch.device("cuda", 0)
    loop.run()
    state["cuda"] = torch.zeros(16, dtype=torch.uint8)
    again = make_loop(tmp_path)
    again.state.device = torch.device("cuda", 0)
    again.run(resume=True)
    assert torch.equal(state["cuda"], torch.arange(16, dtype=torch.uint8))


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda number: calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
    )
    real = os.replace

    def rename(old, new):
        calls.append("rename")
        real(old, new)

    monkeypatch.setattr(os, "replace", rename)
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("what is synced is read from /proc")
    FolderCheckpointer(tmp_path).save(1, {"a": torch.zeros(2)}, {})
    folder = len(calls) - 1 - calls[::-1].index("00000001-000000.part")
    assert {"__0_0.distcp", ".metadata.tmp"} <= {*calls[:folder]}
    assert calls[folder : folder + 3] == ["00000001-000000.part", "rename", "checkpoints"]
    assert calls[-1] == "checkpoints"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "00000001-000000\n"


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_checkpoints_are_kept(tmp_path, keep):
    make_loop(tmp_path, save_every=2, keep=keep).run()
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    assert found == [f"{step:08d}-000001" for step in (8, 10, 12)][-keep:]


def test_what_is_saved_is_the_state_of_the_call(tmp_path):
    """The writer in the background works on a copy."""
    loop = make_loop(tmp_path, model=nn.Linear(4, 1))
    loop.checkpointer.claim()
    weight = next(loop.model.parameters())
    expected = weight.detach().clone()
    loop._save()
    with torch.no_grad():
        weight.zero_()
    loop.checkpointer.release()
    assert torch.equal(kept_tensors(tmp_path)["model/weight"], expected)
