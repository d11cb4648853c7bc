"""Training generators with experts: resuming, checkpointed gradients, upcycling, Muon."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data.config import ConfigError
from generation.drawing.decoding import generate_codes
from generation.drawing.sampling import SamplingOptions
from generation.training.config import GeneratorTrainConfig
from generation.training.train_generator import train
from generation.transformer.experts import (
    ExpertOptions,
    Experts,
)
from generation.transformer.grouped import grouped_works
from generation.transformer.model import Transformer
from tests.helpers.experts import CHOICES
from tests.helpers.generators import GRID
from tests.helpers.tiny_codes import make_config, write_workspace
from tests.helpers.training import read_log
from vqvae.storage.parts import load_part
from vqvae.training.config import LoopConfig
from vqvae.training.muon import orthogonalise
from vqvae.training.optimizers import build_optimizers


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    write_workspace(folder)
    return folder


def settings(workspace: Path, out: Path, experts: dict[str, Any], **changes: Any) -> GeneratorTrainConfig:
    steps = {"steps": 6, "log_every": 1, "eval_every": 6, "save_every": 3, "precision": "float32", "ema": 0.9}
    changes = {**steps, **changes}
    model = {"depth": 2, **changes.pop("model", {}), **({"experts": ExpertOptions(**experts)} if experts else {})}
    return make_config(workspace, out, model=model, **changes)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("gate", CHOICES)
def test_a_generator_with_experts_trains_resumes_and_draws(
    workspace: Path, tmp_path: Path, gate: str, optimizer: str
) -> None:
    more = {"optimizer": optimizer, "muon_dtype": "float32"}
    whole = train(settings(workspace, tmp_path / "whole", CHOICES[gate], **more))
    figures = [line for line in read_log(tmp_path / "whole") if "loss" in line]
    assert all(line["load"] >= 1 and 0 <= line["dropped"] < 1 for line in figures)
    half = settings(workspace, tmp_path / "half", CHOICES[gate], **more)
    train(replace(half, loop=replace(half.loop, steps=3)))
    resumed = train(half, resume=True)
    one, other = (load_part(Transformer, folder) for folder in (whole, resumed))
    if gate == "bias":
        assert float(one.expert_layers[0].bias.abs().sum()) > 0
    assert set(one.state_dict()) == set(other.state_dict())
    drawn = generate_codes(other.float(), [[1], [2]], [3, 4], SamplingOptions(guidance=2.0), grid=GRID)
    assert bool(((drawn >= 0) & (drawn < 16)).all())


def test_a_resumed_run_is_the_run_it_would_have_been(workspace: Path, tmp_path: Path) -> None:
    options = {"count": 4, "gate": "switch"}  # with noise: the random numbers are restored, too
    whole = train(settings(workspace, tmp_path / "whole", options))
    stopped = settings(workspace, tmp_path / "half", options)
    import generation.training.train_generator as module

    def interrupted(config: GeneratorTrainConfig) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.LossModule, "forward", stop_at(4, module.LossModule.forward))
            with pytest.raises(KeyboardInterrupt):
                train(config)

    interrupted(stopped)
    resumed = train(stopped, resume=True)
    one, other = (load_part(Transformer, folder).state_dict() for folder in (whole, resumed))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def stop_at(call: int, forward: Any) -> Any:
    calls = [0]

    def counted(self: Any, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] > call:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    return counted


def test_gradient_checkpointing_gives_the_same_run(workspace: Path, tmp_path: Path) -> None:
    losses = []
    for again in (False, True):
        grouped_works.cache_clear()  # the trial, in the first pass, leaves nothing behind that is computed again
        config = settings(workspace, tmp_path / str(again), {"count": 4, "gate": "gshard"})
        train(replace(config, checkpoint_gradients=again))
        losses.append([line["loss"] for line in read_log(tmp_path / str(again)) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("gate", CHOICES)
def test_experts_start_as_the_mlp_of_a_dense_generator(workspace: Path, tmp_path: Path, gate: str) -> None:
    dense = train(settings(workspace, tmp_path / "dense", {}))
    options = {name: value for name, value in CHOICES[gate].items() if name != "shared"}
    config = settings(workspace, tmp_path / "experts", options, learning_rate=0.0, weight_decay=0.0, steps=1, ema=0.0)
    upcycled = load_part(Transformer, train(replace(config, upcycle=str(dense)))).float()
    source = load_part(Transformer, dense).float()
    tokens, positions = torch.arange(12)[None], torch.zeros(1, 12, 2, dtype=torch.int64)
    theirs, ours = source(tokens, positions), upcycled(tokens, positions)
    # the weights of switch are only about 1 / E
    assert torch.allclose(ours, theirs, atol=0.3 if gate == "switch" else 1e-4)
    assert upcycled.expert_layers


def test_upcycling_wants_the_same_sizes(workspace: Path, tmp_path: Path) -> None:
    dense = train(settings(workspace, tmp_path / "dense", {}))
    config = settings(workspace, tmp_path / "experts", {"count": 2}, model={"depth": 1})
    with pytest.raises(ConfigError, match="is a generator of another configuration or of other parts, or has experts"):
        train(replace(config, upcycle=str(dense)))


def test_muon_orthogonalises_each_expert_by_itself() -> None:
    torch.manual_seed(6)
    model = nn.Module()
    model.blocks = nn.ModuleList([Experts(ExpertOptions(3), 8, 4, gated=False, bias=True, shared=None)])
    (layer,) = model.blocks
    assert isinstance(layer, Experts)
    layer.initialise(0.02)
    config = LoopConfig(optimizer="muon", muon_dtype="float32", learning_rate=0.1, weight_decay=0.0)
    adamw, muon = build_optimizers(model, config)
    names = {name for group in muon.param_groups for name in group["param_names"]}
    assert names == {"blocks.0.expand", "blocks.0.project", "blocks.0.router.weight"}
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.0]
    before = layer.expand.detach().clone()
    layer.expand.grad = torch.randn_like(layer.expand)
    muon.step()
    group = muon.param_groups[0]
    for expert in range(3):
        update = layer.expand.grad[expert]  # the first step's momentum has this direction
        unit = orthogonalise(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        scale = 0.1 * 0.2 * math.sqrt(8)
        assert torch.allclose(before[expert] - layer.expand[expert], scale * unit, atol=1e-5)
