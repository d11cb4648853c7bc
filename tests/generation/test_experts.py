"""Experts: the gates against their published code and transformers' routers, dispatch, balance, files, decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.config import ConfigError, from_dict, to_stored
from generation.drawing.decoding import generate_codes
from generation.drawing.engines import Engine
from generation.drawing.sampling import SamplingOptions
from generation.training.config import GeneratorTrainConfig
from generation.transformer.config import TransformerConfig
from generation.transformer.experts import (
    ExpertOptions,
    Experts,
    Routing,
    balance,
    bias_gate,
    gshard_gate,
    keep_first,
    switch_gate,
)
from generation.transformer.grouped import grouped_product
from generation.transformer.int8 import quantise
from generation.transformer.model import MLP, Transformer
from tests.helpers.experts import CHOICES, make_experts
from tests.helpers.generators import GRID, PROMPTS, SEEDS, SIZES, make_model
from vqvae.storage.parts import load_part, save_part

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "fastmoe" / "gates.json").read_text())


def balance_of(routing: Routing) -> float:
    """The loss as its docstring gives it."""
    shares = routing.firsts / routing.tokens * routing.probabilities / routing.tokens
    return float(len(shares) * shares.sum().detach())


# gates


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_gates_compute_what_the_published_code_computes(case: dict[str, Any]) -> None:
    """tests/golden/fastmoe: FastMoE's SwitchGate and GShardGate ran on these logits, noise and random numbers fixed."""
    logits, random = torch.tensor(case["logits"]), torch.tensor(case["random"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand_like", lambda like: random[: like.numel()].view_as(like))
        if case["gate"] == "switch":
            routing = switch_gate(logits, case["capacity"], 0.1 if case["training"] else 0.0)
        else:
            routing = gshard_gate(logits, 2, case["capacity"], case["random_routing"])
    assert routing.chosen.tolist() == case["chosen"]
    assert torch.allclose(routing.weights, torch.tensor(case["weights"]), atol=1e-6)
    assert balance_of(routing) == pytest.approx(case["loss"], abs=1e-6)
    assert any(-1 in row for row in case["chosen"]), "a case without a dropped token shows less"


def test_switch_is_the_router_of_transformers() -> None:
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersTop1Router,
        load_balancing_loss_func,
    )

    torch.manual_seed(0)
    config = SwitchTransformersConfig(d_model=16, num_experts=5, expert_capacity=6, router_jitter_noise=0.0)
    router = SwitchTransformersTop1Router(config).eval()
    nn.init.normal_(router.classifier.weight)
    x = torch.randn(1, 40, 16)
    one_hot, weights, logits = router(x)
    routing = switch_gate(logits[0], capacity=6 * 5 / 40)
    dropped = one_hot[0].sum(dim=1) == 0
    assert 0 < int(dropped.sum()) < 40
    assert torch.equal(routing.chosen[:, 0], one_hot[0].argmax(dim=1).masked_fill(dropped, -1))
    assert torch.equal(routing.weights, weights[0])
    free = switch_gate(logits[0])
    theirs = load_balancing_loss_func(logits.softmax(-1), free.chosen.view(1, -1))
    assert balance_of(free) == pytest.approx(float(theirs), abs=1e-6)


def test_gshard_and_bias_are_the_routers_of_transformers() -> None:
    from transformers import DeepseekV3Config, MixtralConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func

    torch.manual_seed(1)
    x = torch.randn(30, 16)
    mixtral: Any = MixtralTopKRouter(MixtralConfig(hidden_size=16, num_local_experts=6, num_experts_per_tok=2))
    nn.init.normal_(mixtral.weight)
    logits, weights, chosen = mixtral(x)
    routing = gshard_gate(logits)
    assert torch.equal(routing.chosen, chosen)
    assert torch.allclose(routing.weights, weights, atol=1e-6)
    # GShard counts first choices alone, as Mixtral's does for one expert
    assert balance_of(routing) == pytest.approx(float(load_balancing_loss_func((logits,), 6, 1)), abs=1e-6)

    sizes: dict[str, Any] = {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    sizes |= {"hidden_size": 16}
    deepseek: Any = DeepseekV3TopkRouter(DeepseekV3Config(**sizes, routed_scaling_factor=1.0, norm_topk_prob=True))
    nn.init.normal_(deepseek.weight)
    deepseek.e_score_correction_bias.data = torch.randn(6) / 3
    logits, weights, chosen = deepseek(x)
    routing = bias_gate(logits, 2, deepseek.e_score_correction_bias)
    order, theirs = routing.chosen.argsort(), chosen.argsort()  # theirs come in any order
    assert torch.equal(routing.chosen.gather(1, order), chosen.gather(1, theirs))
    assert torch.allclose(routing.weights.gather(1, order), weights.gather(1, theirs), atol=1e-6)
    assert not torch.equal(routing.chosen, bias_gate(logits, 2, torch.zeros(6)).chosen)


def test_the_first_tokens_of_an_expert_are_kept() -> None:
    chosen = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 0]])
    assert keep_first(chosen, 3, 2).tolist() == [[0, 1], [0, 2], [-1, 1], [-1, -1]]


# dispatch


def by_hand(layer: Experts, x: Tensor, routing: Routing) -> Tensor:
    """Token by token, expert by expert."""
    rows = []
    for token, chosen, weights in zip(x, routing.chosen.tolist(), routing.weights, strict=True):
        row = torch.zeros_like(token)
        for expert, weight in zip(chosen, weights, strict=True):
            if expert >= 0:
                gate, up = (layer.expand[expert] @ token).chunk(2)
                row = row + weight * (layer.project[expert] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("capacity", [None, 0.7])
@pytest.mark.parametrize("gate", ["switch", "gshard", "bias"])
def test_training_and_eval_mode_mix_what_the_gate_chose(gate: Any, capacity: float | None) -> None:
    torch.manual_seed(2)
    layer = Experts(ExpertOptions(5, gate, capacity=capacity, noise=0.0), 8, 16, gated=True, bias=False, shared=None)
    layer.initialise(0.5)
    x = torch.randn(2, 9, 8)
    y = layer.train()(x)
    assert layer.routed is not None
    assert torch.allclose(y.flatten(0, 1), by_hand(layer, x.flatten(0, 1), layer.routed), atol=1e-6)
    assert bool((layer.routed.chosen < 0).any()) == (capacity is not None or gate == "gshard")
    y.backward(torch.ones_like(y))
    found = [parameter.grad for parameter in layer.parameters()]
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in found)
    layer.eval()
    assert torch.allclose(layer(x)[1], by_hand(layer, x[1], layer._route(x[1])), atol=1e-6)
    assert int(layer._route(x[1]).chosen.min()) >= 0, "in eval mode nothing is dropped"


def test_groups_are_multiplied_alike_in_one_operation_and_in_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    x, weights = torch.randn(10, 8, requires_grad=True), torch.randn(4, 12, 8, requires_grad=True)
    counts = torch.tensor([3, 0, 5, 2])

    def computed() -> list[Tensor]:
        y = grouped_product(x, weights, counts)
        return [y, *torch.autograd.grad(y, (x, weights), torch.ones_like(y))]

    first = computed()
    monkeypatch.setattr("generation.transformer.grouped.grouped_works", lambda device, dtype: False)
    for one, other in zip(first, computed(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_biases_and_gelu_of_the_other_structure() -> None:
    model = make_model(TransformerConfig.cogview(**SIZES, experts=ExpertOptions(3, "gshard", random_second=False)))
    for layer in model.expert_layers:
        assert layer.expand_bias is not None
        nn.init.normal_(layer.expand_bias)
    x = torch.randn(2, 7, 64)
    (layer, *_) = model.expert_layers
    assert torch.allclose(layer.train()(x), layer.eval()(x), atol=1e-5)


# balance


def test_the_balance_of_two_shares_has_the_gradient_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What processes do, in one: counts are added up over them, and the gradients averaged."""
    torch.manual_seed(4)
    layer = Experts(ExpertOptions(4, "switch", noise=0.0), 8, 16, gated=True, bias=False, shared=None).train()
    x = torch.randn(2, 20, 8)
    layer(x)
    whole = torch.autograd.grad(balance([layer])["balance_loss"], layer.router.weight)[0]
    counts = layer._route(x.flatten(0, 1)).load
    parts = []
    for half in x:
        layer(half[None])
        monkeypatch.setattr("generation.transformer.experts._processes", lambda: 2)
        totals = iter([torch.cat([counts, counts, counts.sum()[None]])[None], torch.tensor(40.0)])
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, totals=totals: tensor.copy_(next(totals)))
        parts.append(torch.autograd.grad(balance([layer])["balance_loss"], layer.router.weight)[0])
    assert torch.allclose((parts[0] + parts[1]) / 2, whole, atol=1e-7)


def test_the_bias_evens_the_load() -> None:
    torch.manual_seed(5)
    options = ExpertOptions(4, "bias", bias_rate=0.01)
    layer = Experts(options, 8, 16, gated=True, bias=False, shared=None).train()
    layer.initialise(0.02)
    x = torch.randn(1, 200, 8) + 1  # not around zero, so that some experts are preferred
    nn.init.normal_(layer.router.weight, std=0.5)
    loads = []
    for _ in range(100):
        layer(x)
        loads.append(float(balance([layer])["load"]))
        layer.adjust()
    assert loads[0] > 1.3
    assert loads[-1] < 1.1
    assert float(layer.load.sum()) == 0


# configuration and files


def test_a_model_without_experts_is_stored_as_before(tmp_path: Path) -> None:
    config = TransformerConfig.modern(**SIZES)
    save_part(Transformer(config), tmp_path / "dense")
    record = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "experts" not in record
    assert "experts" not in to_stored(config)
    assert load_part(Transformer, tmp_path / "dense").config == config
    model = make_experts(count=4, gate="bias")
    save_part(model, tmp_path / "experts", torch.float32)
    loaded = load_part(Transformer, tmp_path / "experts")
    assert loaded.config == model.config
    tokens, positions = torch.arange(12)[None], torch.zeros(1, 12, 2, dtype=torch.int64)
    assert torch.equal(loaded(tokens, positions), model(tokens, positions))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": {"count": 4, "gate": "soft"}}, r"experts\.gate: Input should be 'switch', 'gshard' or 'bias'"),
        ({"experts": {"count": 4, "capacity": 0.0}}, r"capacity must be a number above 0 and at most 4096, not 0\.0"),
        ({"experts": {"count": 1}}, "leaves nothing to choose"),
        ({"experts": {"count": 4, "top_k": 2}}, "switch chooses one expert, not experts.top_k=2: use gshard or bias"),
        ({"experts": {"count": 4, "top_k": 1, "gate": "gshard"}}, "use switch or bias"),
        ({"experts": {"count": 4, "top_k": 5, "gate": "bias"}}, "top_k=5 must be at most experts.count=4"),
        ({"experts": {"gate": "bias"}}, r"experts\.gate is given, but experts\.count is 0"),
        ({"experts": {"count": 4, "every": 9}}, "every=9: with depth=8 no block would have experts"),
    ],
)
def test_settings_that_do_not_fit_are_told_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_dict(GeneratorTrainConfig, {"model": settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"upcycle": "x"}, r"set model\.experts\.count"),
        ({"upcycle": "x", "model": {"experts": {"count": 2, "shared": 1}}}, r"leave out model\.experts\.width"),
        ({"upcycle": "x", "start_from": "y", "model": {"experts": {"count": 2}}}, "leave one out"),
    ],
)
def test_upcycling_that_does_not_fit_is_told_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(GeneratorTrainConfig, settings)


# decoding


@pytest.mark.parametrize("gate", CHOICES)
def test_a_picture_is_the_same_in_any_company(gate: str) -> None:
    model = make_experts(**CHOICES[gate])
    options = SamplingOptions(guidance=2.0)
    together = generate_codes(model, PROMPTS, SEEDS, options, grid=GRID)
    for number in (0, 5, 11):
        alone = generate_codes(model, [PROMPTS[number]], [SEEDS[number]], options, grid=GRID)
        assert torch.equal(alone[0], together[number])
    windows = SamplingOptions(window=4)
    together = generate_codes(model, PROMPTS[:6], SEEDS[:6], windows, grid=GRID)
    assert torch.equal(generate_codes(model, [PROMPTS[3]], [SEEDS[3]], windows, grid=GRID)[0], together[3])


def test_engines_that_cannot_run_experts_say_so() -> None:
    model = make_experts(count=4)
    assert Engine().resolved(model) == "modules"
    with pytest.raises(ValueError, match="on a CPU, without experts: use modules or auto"):
        Engine("fused").resolved(model)
    for kind in ("graph", "compile"):
        with pytest.raises(ValueError, match=f"the {kind} engine cannot record which experts a token needs"):
            Engine(kind).resolved(model)
    with pytest.raises(ValueError, match="weights of 8 bits are not made for experts"):
        quantise(model)


def test_only_every_nth_block_has_experts() -> None:
    model = Transformer(TransformerConfig.modern(**{**SIZES, "depth": 5}, experts=ExpertOptions(4, every=2)))
    assert [isinstance(block.mlp, Experts) for block in model.blocks] == [False, True, False, True, False]
    assert isinstance(model.blocks[0].mlp, MLP)
