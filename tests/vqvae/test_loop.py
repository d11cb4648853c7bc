import math

import pytest
import torch
from torch import nn

from data.config import from_dict
from tests.helpers.training import Headed, make_loop, read_log, weights
from vqvae.training.config import LoopConfig, TrainingError
from vqvae.training.optimizers import learning_rate_factor

# the schedule


def test_learning_rate_schedule():
    config = LoopConfig(warmup=4, final_ratio=0.1, steps=100)
    assert [learning_rate_factor(step / 100, step, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate_factor(0.5, 50, config) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate_factor(1.0, 100, config) == pytest.approx(0.1)
    assert learning_rate_factor(1.2, 120, config) == pytest.approx(0.1)  # a clock may overshoot
    factors = [learning_rate_factor(step / 100, step, config) for step in range(4, 101)]
    assert factors == sorted(factors, reverse=True)
    assert learning_rate_factor(0.0, 0, LoopConfig(warmup=0)) == 1.0


def test_the_optimizer_follows_the_schedule(tmp_path):
    loop = make_loop(tmp_path, log_every=1)
    loop.run()
    logged = [record["learning_rate"] for record in read_log(tmp_path) if "learning_rate" in record]
    expected = [0.05 * learning_rate_factor(step / 12, step, loop.config) for step in range(12)]
    assert logged == pytest.approx(expected, rel=1e-5)


# one step


def test_the_loss_goes_down(tmp_path):
    make_loop(tmp_path, steps=200, model=nn.Linear(4, 1)).run()
    losses = [record["train/loss"] for record in read_log(tmp_path) if "train/loss" in record]
    assert losses[-1] < losses[0] / 20


def test_logged_figures_are_means(tmp_path):
    make_loop(tmp_path / "each", log_every=1).run()
    make_loop(tmp_path / "mean").run()
    each = [r["train/absolute"] for r in read_log(tmp_path / "each") if "train/absolute" in r]
    mean = [r["train/absolute"] for r in read_log(tmp_path / "mean") if "train/absolute" in r]
    assert mean == pytest.approx([sum(each[start : start + 4]) / 4 for start in (0, 4, 8)], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulation_is_one_large_batch(tmp_path, optimizer):
    found = []
    for accumulate in (1, 2, 8):
        loop = make_loop(tmp_path / str(accumulate), model=Headed(), accumulate=accumulate, optimizer=optimizer)
        found.append(weights(loop.run()))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_muon_is_for_the_matrices_of_blocks(tmp_path):
    model = Headed()
    adamw, muon = make_loop(tmp_path, model=model, optimizer="muon").optimizers
    assert isinstance(muon, torch.optim.Muon)
    held = [parameter for group in muon.param_groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(block.weight) for block in model.blocks}
    rest = [parameter for group in adamw.param_groups for parameter in group["params"]]
    assert len(rest) + len(held) == len(list(model.parameters()))


def test_biases_are_not_decayed(tmp_path):
    model = nn.Linear(4, 1)
    (optimizer,) = make_loop(tmp_path, model=model, weight_decay=0.3).optimizers
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(model.weight): 0.3, id(model.bias): 0.0}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_fused_step_is_the_same_step(tmp_path, optimizer):
    loops = [make_loop(tmp_path / str(on), model=Headed(), optimizer=optimizer, fused=on) for on in (True, False)]
    assert [bool(loop.optimizers[0].defaults["fused"]) for loop in loops] == [True, False]
    fused, plain = (weights(loop.run()) for loop in loops)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_gradients_are_clipped(tmp_path, monkeypatch):
    norms: dict[float, list[float]] = {}
    for clip in (0.0, 0.25):
        loop = make_loop(tmp_path / str(clip), clip=clip, model=nn.Linear(4, 1))
        (optimizer,) = loop.optimizers
        seen = norms[clip] = []

        def step(optimizer=optimizer, seen=seen, original=optimizer.step):
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            seen.append(float(torch.cat([g.flatten() for g in grads]).norm()))
            return original()

        monkeypatch.setattr(optimizer, "step", step)
        loop.run()
    assert len(norms[0.25]) == 12
    assert max(norms[0.25]) <= 0.25 + 1e-5
    assert max(norms[0.0]) > 1
    assert norms[0.25][0] == pytest.approx(0.25, rel=1e-4)


def test_the_logged_norm_is_that_before_clipping(tmp_path):
    make_loop(tmp_path, clip=0.01).run()
    assert all(r["train/gradient_norm"] > 0.05 for r in read_log(tmp_path) if "train/gradient_norm" in r)


def test_the_average_is_the_formula(tmp_path, monkeypatch):
    loop = make_loop(tmp_path, ema=0.5, model=nn.Linear(4, 1))
    trail = []
    original = loop._update_average

    def update(step):
        trail.append(weights(loop.model))
        original(step)

    monkeypatch.setattr(loop, "_update_average", update)
    averaged = loop.run()
    expected = trail[0]
    for step, live in enumerate(trail[1:], start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * live
    torch.testing.assert_close(weights(averaged), expected)
    assert averaged is not loop.model
    assert len(trail) == 12


def test_buffers_of_the_average_are_the_live_ones(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    averaged = make_loop(tmp_path, ema=0.9, model=model).run()
    assert isinstance(averaged, nn.Sequential)
    live, kept = dict(model.named_buffers()), dict(averaged.named_buffers())
    assert all(torch.equal(kept[name], live[name]) for name in live)
    assert int(kept["0.num_batches_tracked"]) == 12


def test_evaluation_sees_the_average_at_rest(tmp_path):
    seen = []

    def evaluate(model, step):
        seen.append((step, model.training, torch.is_grad_enabled(), weights(model)))
        return {"figure": 1.5}

    averaged = make_loop(tmp_path, ema=0.9, evaluate=evaluate).run()
    assert [entry[:3] for entry in seen] == [(6, False, False), (12, False, False)]
    assert torch.equal(seen[-1][3], weights(averaged))
    assert [r["test/figure"] for r in read_log(tmp_path) if "test/figure" in r] == [1.5, 1.5]
    assert list((tmp_path / "tensorboard").iterdir())


# what is not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path, value, accumulate):
    loop = make_loop(tmp_path / "run", broken={7: value}, accumulate=accumulate, ema=0.9)
    with pytest.raises(TrainingError, match="not finite") as error:
        loop.run()
    text = str(error.value)
    assert "\n" not in text
    assert "at step 7" in text
    assert all(f"step 7 sample {index}" in text for index in range(8))
    until = make_loop(tmp_path / "until", accumulate=accumulate, ema=0.9)
    for step in range(7):
        until._step(step)
        until.progress.step += 1
    assert torch.equal(weights(loop.model), weights(until.model))
    assert torch.equal(weights(loop.averaged), weights(until.averaged))


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    model = nn.Linear(4, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    loop = make_loop(tmp_path, model=model, warmup=0)
    # a root has a finite value and an infinite slope at zero
    loop.task.loss_of = lambda model, batch: {"loss": (model(batch[0]) * 0).abs().sqrt().mean()}
    with pytest.raises(TrainingError, match="loss 0.0 and gradient norm (nan|inf)"):
        loop.run()
    assert not weights(model).any()


# time and devices


def test_a_run_by_the_clock_stops_and_anneals(tmp_path):
    loop = make_loop(tmp_path, minutes=0.3 / 60, log_every=1, eval_every=10**9, save_every=10**9)
    loop.run()
    assert 0.3 <= loop.progress.seconds < 30
    rates = [record["learning_rate"] for record in read_log(tmp_path) if "learning_rate" in record]
    assert rates[-1] < max(rates)
    assert (tmp_path / "checkpoints" / "latest").is_file()


def test_bfloat16_computes_in_bfloat16_over_float32_weights(tmp_path):
    seen = set()

    def spy(model, batch):
        output = model(batch[0])
        seen.add(output.dtype)
        return {"loss": (output.float() - batch[1]).square().mean()}

    loop = make_loop(tmp_path, precision="bfloat16")
    loop.task.loss_of = spy
    assert weights(loop.run()).dtype == torch.float32
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        *(({name: 0}, "at least 1") for name in ("steps", "batch_size", "accumulate")),
        *(({name: 0}, "at least 1") for name in ("log_every", "eval_every", "save_every")),
        ({"learning_rate": -1e-3}, "at least 0"),
        ({"warmup": -1}, "at least 0"),
        ({"minutes": -0.5}, "at least 0"),
        ({"clip": -1.0}, "at least 0"),
        ({"ema": 1.0}, "of at least 0 and below 1"),
        ({"final_ratio": 1.5}, "from 0 to 1"),
        ({"betas": [0.9, 1.0]}, "number of at least 0 and below 1"),
    ],
)
def test_settings_out_of_range_are_named(setting, problem):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} must (be|hold) .*{problem}") as error:
        from_dict(LoopConfig, setting)
    assert "\n" not in str(error.value)


def test_logged_losses_are_finite_numbers(tmp_path):
    make_loop(tmp_path).run()
    assert all(math.isfinite(value) for record in read_log(tmp_path) for value in record.values())
