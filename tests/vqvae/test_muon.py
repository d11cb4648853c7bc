"""Muon in float32, and the choice of its type."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.training import Headed, make_loop
from vqvae.training import muon
from vqvae.training.muon import Float32Muon, bfloat16_is_slow, build_muon, orthogonalise
from vqvae.training.sharding import Layout

SETTINGS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((6, 4), (4, 6), (5, 5))]


def learn(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
def test_it_is_pytorchs_muon_but_for_the_rounding(monkeypatch, nesterov):
    settings = {**SETTINGS, "nesterov": nesterov}
    ours, theirs, rounded = matrices(), matrices(), matrices()
    learn(Float32Muon(ours, **settings), ours, 4)
    learn(torch.optim.Muon(rounded, **settings), rounded, 4)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "bfloat16", torch.float32)  # what PyTorch's iteration casts to
        learn(torch.optim.Muon(theirs, **settings), theirs, 4)
    for one, other, near in zip(ours, theirs, rounded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one, near, rtol=0.05, atol=0.02)
        assert not torch.equal(one, near)


@pytest.mark.parametrize("first", [Float32Muon, torch.optim.Muon])
def test_each_goes_on_from_the_others_state(first):
    second = torch.optim.Muon if first is Float32Muon else Float32Muon
    parameters = matrices()
    begun = first(parameters, **SETTINGS)
    learn(begun, parameters, 2)
    copies = deepcopy(parameters)
    other = second(copies, lr=1.0)
    other.load_state_dict(begun.state_dict())
    learn(begun, parameters, 2, seed=2)
    learn(other, copies, 2, seed=2)
    for one, near in zip(parameters, copies, strict=True):
        torch.testing.assert_close(one, near, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (16, 16)])
def test_singular_values_become_about_one(shape):
    matrix = 1e-3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    found = torch.linalg.svdvals(orthogonalise(matrix, COEFFICIENTS, 5, 1e-7))
    assert found.max() < 1.3
    assert found.median() > 0.6
    assert torch.equal(orthogonalise(torch.zeros(3, 2), COEFFICIENTS, 5, 1e-7), torch.zeros(3, 2))


def test_a_parameter_without_a_gradient_stays():
    parameters = matrices()
    before = parameters[1].detach().clone()
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer = Float32Muon(parameters, **SETTINGS)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(parameters[1], before)
    assert not torch.equal(parameters[0], matrices()[0])


@pytest.mark.parametrize("slow", [True, False])
def test_a_trial_decides(monkeypatch, tmp_path, slow):
    monkeypatch.setattr(muon, "bfloat16_is_slow", lambda: slow)
    found = make_loop(tmp_path, model=Headed(), optimizer="muon").optimizers[1]
    assert type(found) is (Float32Muon if slow else torch.optim.Muon)
    for dtype, kind in (("float32", Float32Muon), ("bfloat16", torch.optim.Muon)):
        found = make_loop(tmp_path, model=Headed(), optimizer="muon", muon_dtype=dtype).optimizers[1]
        assert type(found) is kind


@pytest.mark.parametrize(("bfloat16", "word"), [(0.004, "float32"), (0.0012, "bfloat16"), (0.0002, "bfloat16")])
def test_the_trial_runs_once_and_tells(monkeypatch, capsys, bfloat16, word):
    asked = []

    def seconds(dtype):
        asked.append(dtype)
        return bfloat16 if dtype == torch.bfloat16 else 0.001

    monkeypatch.setattr(muon, "_product_seconds", seconds)
    bfloat16_is_slow.cache_clear()
    try:
        for _ in range(2):
            build_muon([(str(k), matrix) for k, matrix in enumerate(matrices())], "auto", Layout(), **SETTINGS)
        assert asked == [torch.float32, torch.bfloat16]
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"muon in {word}: a product of 256 x 256 takes 1.00 ms in float32")
    finally:
        bfloat16_is_slow.cache_clear()
