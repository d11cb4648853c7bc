"""A generator that processes share out learns what one process learns, and its checkpoints know no number of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data.config import ConfigError
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from generation.transformer.tensor_parallel import split_blocks
from tests.helpers import parallel_training
from tests.helpers.tiny_codes import CODES, logged, write_workspace
from vqvae.training.sharding import Cut

ROOT = Path(__file__).parents[2]
# what shall work with every split: average, clipping, micro-batches, gated MLP, norms of heads, untied head
SETTINGS: dict[str, Any] = {
    "ema": 0.9, "clip": 0.5, "accumulate": 2,
    "model": {"depth": 2, "heads": 4, "mlp": "swiglu", "qk_norm": True, "bias": True, "tie_embeddings": False},
}  # fmt: skip
MUON = {**SETTINGS, "optimizer": "muon", "muon_dtype": "float32"}
SPLITS = {"ddp": {}, "fsdp": {"shard": 2}, "tensor": {"tensor": 2}}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    write_workspace(folder)
    return folder


def run_jobs(workspace: Path, processes: int, jobs: list[dict[str, Any]]) -> None:
    """Run the jobs with `processes` processes; one is this process itself."""
    if processes == 1:
        parallel_training.main(workspace, jobs)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, "-m", "tests.helpers.parallel_training", str(workspace), json.dumps(jobs)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def found(workspace: Path, name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((workspace / f"{name}.json").read_text())
    return record


def assert_same(workspace: Path, name: str, reference: str, tolerance: float = 1e-6) -> None:
    one, other = found(workspace, reference), found(workspace, name)
    assert "refused" not in other, other
    assert len(other["loss"]) == len(one["loss"]) > 0
    assert other["loss"] == pytest.approx(one["loss"], rel=0, abs=tolerance), name
    assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=0, abs=10 * tolerance), name
    assert other["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-3), name


def test_two_processes_learn_what_one_learns(workspace: Path) -> None:
    """Both splits at once in the shortest time; the slow tests below take 30 steps and one thing after another."""
    short = {**SETTINGS, "steps": 4, "log_every": 4, "eval_every": 4, "save_every": 2}
    run_jobs(workspace, 1, [{"name": "short-one", **short}])
    run_jobs(
        workspace, 2,
        [
            {"name": "short-ddp", **short},
            {"name": "short-tensor", **short, "parallel": {"tensor": 2}},
            {"name": "short-fsdp", **short, "parallel": {"shard": 2}},
            {"name": "short-bad", **short, "parallel": {"tensor": 2}, "model": {"heads": 1}},
            {"name": "short-more", **short, "parallel": {"data": 2, "tensor": 2}},
        ],
    )  # fmt: skip
    for name in ("short-ddp", "short-tensor", "short-fsdp"):
        assert_same(workspace, name, "short-one")
        for figure in ("train/image_bits", "test/test-family/image_bits"):
            one, other = (logged(workspace / run, figure) for run in ("short-one", name))
            assert len(one) == len(other) > 0
            assert other == pytest.approx(one, rel=1e-5), figure
    assert found(workspace, "short-bad")["refused"] == (
        "parallel.tensor=2 does not divide the generator's heads=1: change one"
    )
    assert found(workspace, "short-more")["refused"] == (
        "parallel.data=2 x shard=1 x tensor=2 is not the number of processes, 2: "
        "start `torchrun --nproc-per-node 4 -m mmwudao train ...`, or change one of them"
    )


def test_matching_compares_the_vectors_of_all_processes(workspace: Path) -> None:
    model = {**SETTINGS["model"], "match": {"width": 8}}
    settings = {**SETTINGS, "model": model, "mix": {"draw": 1, "match": 2}, "match": {"texts": 2, "batch": 2}}
    short = {**settings, "steps": 4, "log_every": 4, "eval_every": 4, "save_every": 4}
    run_jobs(workspace, 1, [{"name": "match-one", **short}])
    run_jobs(workspace, 2, [{"name": "match-ddp", **short}, {"name": "match-fsdp", **short, "parallel": {"shard": 2}}])
    for name in ("match-ddp", "match-fsdp"):
        assert_same(workspace, name, "match-one", tolerance=1e-4)  # losses are scaled by 1 / temperature
        for figure in ("train/match_loss", "train/image_bits", "test/test-family/text_recall@10"):
            one, other = (logged(workspace / run, figure) for run in ("match-one", name))
            assert len(one) == len(other) > 0
            assert other == pytest.approx(one, rel=1e-4), figure


BOTH = {
    "hybrid": {"data": 2, "shard": 2},
    "data-tensor": {"data": 2, "tensor": 2},
    "shard-tensor": {"shard": 2, "tensor": 2},
}
COMPARED = {
    "plain": (2, SPLITS, SETTINGS),
    "muon": (2, SPLITS, MUON),
    "checkpoint_gradients": (2, SPLITS, {**SETTINGS, "checkpoint_gradients": True}),
    "compile": (2, SPLITS, {**SETTINGS, "compile": True}),
    "two axes": (4, BOTH, SETTINGS),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("what", COMPARED)
def test_thirty_steps_of_every_split(workspace: Path, what: str) -> None:
    processes, splits, settings = COMPARED[what]
    uncompiled = {name: value for name, value in settings.items() if name != "compile"}
    run_jobs(workspace, 1, [{"name": f"{what}-one", **uncompiled}])
    jobs = [{"name": f"{what}-{name}", **settings, "parallel": parallel} for name, parallel in splits.items()]
    run_jobs(workspace, processes, jobs)
    for job in jobs:
        assert_same(workspace, job["name"], f"{what}-one")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("split", ["fsdp", "tensor", "shard-tensor"])
def test_a_checkpoint_of_some_processes_is_read_by_others(workspace: Path, split: str) -> None:
    """Half of the steps by two or four processes, the rest by one, and by four that share out in another way."""
    parallel = {**SPLITS, "shard-tensor": {"shard": 2, "tensor": 2}}[split]
    writers = 4 if split == "shard-tensor" else 2
    half = {**MUON, "steps": 30}
    whole, first = f"whole-{split}", f"first-{split}"
    run_jobs(workspace, 1, [{"name": whole, **half}])
    run_jobs(workspace, writers, [{"name": first, **half, "save_every": 15, "keep": 2, "parallel": parallel}])
    for readers, way in ((1, {}), (4, {"shard": 4}), (4, {"shard": 2, "tensor": 2})):
        name = f"{first}-{readers}-{len(way)}"
        copy_first(workspace / first, workspace / name)
        run_jobs(workspace, readers, [{"name": name, **half, "resume": True, "parallel": way}])
        one, rest = found(workspace, whole), found(workspace, name)
        assert rest["loss"] == pytest.approx(one["loss"][15:], rel=0, abs=2e-6)
        assert rest["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-3)


def copy_first(run: Path, out: Path) -> None:
    """Let `out` hold the first of the checkpoints in the folder of a run."""
    first = min(path for path in (run / "checkpoints").iterdir() if path.is_dir())
    shutil.copytree(first, out / "checkpoints" / first.name)
    (out / "checkpoints" / "latest").write_text(f"{first.name}\n")


# cutting, in one process


class Mesh:
    """Of a mesh of one axis, what cutting asks for."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count

    def size(self) -> int:
        return self.count

    def get_local_rank(self) -> int:
        return self.rank


@pytest.mark.parametrize(("axis", "parts"), [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_cuts_are_joined_to_the_whole(axis: int, parts: int, count: int) -> None:
    whole, cut = torch.arange(24 * 24).view(24, 24), Cut(axis, parts)
    meshes: list[Any] = [Mesh(rank, count) for rank in range(count)]
    shares = [cut.of(whole, mesh) for mesh in meshes]
    assert torch.equal(cut.join(shares), whole)
    size = 24 // count
    for mesh, share in zip(meshes, shares, strict=True):
        for first, places in ((0, size), (1, size - 2), (size - 1, 1)):
            pieces = cut.pieces(first, places, size, mesh)
            assert sum(piece[2] for piece in pieces) == places
            for here, there, number in pieces:
                assert torch.equal(share.narrow(axis, first + here, number), whole.narrow(axis, there, number))


def test_each_process_has_its_share_of_a_block() -> None:
    model = Transformer(TransformerConfig(num_image_codes=CODES, width=16, depth=2, heads=4, max_text=12, bias=True))
    before = sum(parameter.numel() for parameter in model.blocks.parameters())
    mesh: Any = Mesh(1, 2)
    cuts = split_blocks(model, mesh)
    after = sum(parameter.numel() for parameter in model.blocks.parameters())
    assert after < 0.53 * before
    names = {name for name, _ in model.named_parameters()}
    assert set(cuts) <= names
    assert {name.partition("1.")[2] for name in cuts if name.startswith("blocks.1")} == {
        "attention.qkv.weight", "attention.qkv.bias", "attention.project.weight", "mlp.expand.weight",
        "mlp.expand.bias", "mlp.project.weight",
    }  # fmt: skip
    assert isinstance(model.embed, nn.Embedding)


def test_heads_that_share_keys_are_refused() -> None:
    sizes = TransformerConfig(num_image_codes=CODES, width=16, depth=1, heads=4, kv_heads=2, max_text=12)
    mesh: Any = Mesh(0, 2)
    with pytest.raises(ConfigError, match=r"parallel\.tensor=2 takes no kv_heads=2: use parallel\.shard"):
        split_blocks(Transformer(sizes), mesh)
