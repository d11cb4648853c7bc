"""Processes that share out the experts of a generator learn what one process learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data.config import ConfigError
from generation.transformer.config import TransformerConfig
from generation.transformer.expert_parallel import split_experts
from generation.transformer.experts import ExpertOptions, Experts
from generation.transformer.model import Transformer
from tests.generation.test_parallel_training import Mesh, assert_same, copy_first, found, run_jobs
from tests.helpers.generators import SIZES
from tests.helpers.tiny_codes import write_workspace

# what shall be the same on one process and on two: no noise, nothing left out by chance, all tokens taken
EXPERTS: dict[str, dict[str, Any]] = {
    "switch": {"count": 4, "gate": "switch", "noise": 0.0},
    "gshard": {"count": 4, "gate": "gshard", "random_second": False, "balance": 0.1},
    "bias": {"count": 4, "gate": "bias", "shared": 1, "bias_rate": 0.05},
}
SETTINGS: dict[str, Any] = {"ema": 0.9, "clip": 0.5, "accumulate": 2}
MODEL = {"depth": 2, "heads": 4, "mlp": "swiglu", "bias": True}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    write_workspace(folder)
    return folder


def settings(gate: str, **changes: Any) -> dict[str, Any]:
    return {**SETTINGS, "model": {**MODEL, "experts": EXPERTS[gate]}, **changes}


def test_two_processes_learn_what_one_learns(workspace: Path) -> None:
    """Expert parallel, two whole copies, and FSDP2: the balance counts the tokens of all processes."""
    short = {"steps": 4, "eval_every": 4, "save_every": 2}
    run_jobs(workspace, 1, [{"name": f"one-{gate}", **settings(gate, **short)} for gate in EXPERTS])
    jobs = [
        {"name": f"expert-{gate}", **settings(gate, **short, parallel={"expert": 2}), "keep": 2} for gate in EXPERTS
    ]
    jobs += [
        {"name": "copies", **settings("switch", **short)},
        {"name": "sharded", **settings("bias", **short, parallel={"shard": 2})},
        {"name": "odd", **settings("switch", parallel={"expert": 2}), "model": {"experts": {"count": 3}}},
        {"name": "dense", **SETTINGS, "parallel": {"expert": 2}},
        {"name": "tensor", **settings("switch", parallel={"tensor": 2})},
    ]
    run_jobs(workspace, 2, jobs)
    for gate in EXPERTS:
        assert_same(workspace, f"expert-{gate}", f"one-{gate}")
    assert_same(workspace, "copies", "one-switch")
    assert_same(workspace, "sharded", "one-bias")
    refusals = {name: found(workspace, name)["refused"] for name in ("odd", "dense", "tensor")}
    assert refusals["odd"] == "parallel.expert=2 does not divide model.experts.count=3: change one"
    assert refusals["dense"].startswith("parallel.expert=2 shares out experts: set model.experts.count")
    assert refusals["tensor"] == "parallel.tensor=2 takes no experts: use parallel.expert or parallel.shard"
    # what two processes wrote after two steps, one goes on from
    copy_first(workspace / "expert-bias", workspace / "rest")
    run_jobs(workspace, 1, [{"name": "rest", **settings("bias", **short), "resume": True}])
    one, rest = found(workspace, "one-bias"), found(workspace, "rest")
    assert rest["loss"] == pytest.approx(one["loss"][2:], rel=0, abs=2e-6)
    assert rest["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-3)


COMPARED: dict[str, dict[str, Any]] = {
    "plain": {},
    "muon": {"optimizer": "muon", "muon_dtype": "float32"},
    "checkpoint_gradients": {"checkpoint_gradients": True},
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("what", COMPARED)
def test_thirty_steps_of_every_gate(workspace: Path, what: str) -> None:
    run_jobs(workspace, 1, [{"name": f"{what}-one-{gate}", **settings(gate, **COMPARED[what])} for gate in EXPERTS])
    jobs = [
        {"name": f"{what}-{gate}", **settings(gate, **COMPARED[what], parallel={"expert": 2})} for gate in EXPERTS
    ]
    run_jobs(workspace, 2, jobs)
    for gate in EXPERTS:
        assert_same(workspace, f"{what}-{gate}", f"{what}-one-{gate}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_copies_of_processes_that_share_out_experts(workspace: Path) -> None:
    run_jobs(workspace, 1, [{"name": "four-one", **settings("gshard")}])
    run_jobs(
        workspace, 4,
        [
            {"name": "four", **settings("gshard", parallel={"data": 2, "expert": 2})},
            {"name": "four-shard", **settings("gshard", parallel={"shard": 2, "expert": 2})},
        ],
    )  # fmt: skip
    assert_same(workspace, "four", "four-one")
    assert found(workspace, "four-shard")["refused"] == (
        "parallel.expert=2 goes with parallel.data alone: leave shard and tensor at 1"
    )


def test_each_process_has_its_share_of_the_experts() -> None:
    model = Transformer(TransformerConfig.modern(**SIZES, experts=ExpertOptions(6)))
    whole = model.expert_layers[1].expand.detach().clone()
    mesh: Any = Mesh(1, 2)
    cuts = split_experts(model, mesh, "model.")
    layer = model.expert_layers[1]
    assert torch.equal(layer.expand, whole[3:])
    assert layer.router.weight.shape == (6, 64)
    assert "model.blocks.1.mlp.project" in cuts
    assert all(isinstance(block.mlp, Experts) for block in model.blocks)
    with pytest.raises(ConfigError, match="expert=4 does not divide"):
        split_experts(Transformer(TransformerConfig.modern(**SIZES, experts=ExpertOptions(6))), Mesh(0, 4))  # type: ignore[arg-type]
