"""Weights of 8 bits multiplied in whole numbers: exact but for the rounding of a row, alone as in company."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from generation.drawing.decoding import generate_codes
from generation.drawing.sampling import SamplingOptions
from generation.transformer import int8, whole_numbers
from generation.transformer.int8 import is_quantised, quantise
from generation.transformer.whole_numbers import WholeNumberLinear, multiplies_whole_numbers
from tests.helpers.generators import GRID, PRESETS, PROMPTS, SEEDS, make_model

works = pytest.mark.skipif(not multiplies_whole_numbers(), reason="this CPU or PyTorch has no such product")


def weights(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(outputs)
    numbers = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    return numbers, torch.rand(outputs, generator=generator) / 100


@works
@pytest.mark.parametrize(("outputs", "inputs"), [(192, 64), (256, 704), (33, 101), (6144, 2048)])
def test_rows_are_right_and_the_same_in_any_company(outputs: int, inputs: int) -> None:
    numbers, scales = weights(outputs, inputs)
    layer = WholeNumberLinear(numbers, scales)
    x = torch.randn(33, inputs, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 33)[:, None]
    x[4] = 0
    x[5, 1:] = 0  # one large number
    found = layer.multiply(x)
    wanted = x.double() @ (numbers.double() * scales.double()[:, None]).T
    size = wanted.square().mean(dim=1).sqrt()
    assert bool(((found - wanted).square().mean(dim=1).sqrt() <= 5e-4 * size).all())
    assert not found[4].any()
    for rows in (1, 2, 3, 7, 16):
        assert torch.equal(layer.multiply(x[:rows]), found[:rows])
        assert torch.equal(layer.multiply(x[-rows:]), found[-rows:])
    for row in range(33):
        assert torch.equal(layer.multiply(x[row : row + 1])[0], found[row])


@works
def test_the_worst_sums_do_not_overflow() -> None:
    for largest in (127, -128):
        layer = WholeNumberLinear(torch.full((64, 512), largest, dtype=torch.int8), torch.ones(64))
        x = torch.ones(3, 512)
        x[1], x[2, ::2] = -1, -1
        wanted = torch.tensor([[1.0], [-1.0], [0.0]]) * (512 * largest)
        torch.testing.assert_close(layer.multiply(x), wanted.expand(3, 64), rtol=1e-5, atol=1e-3)


@works
@pytest.mark.parametrize("preset", ["modern", "cogview"])
def test_a_generator_is_made_of_them(preset: str) -> None:
    """Also one with biases; its logits are those of the weights of 8 bits in float32."""
    model = make_model(PRESETS[preset])
    quantised, rounded = quantise(deepcopy(model)), deepcopy(model)
    assert is_quantised(quantised)
    for name, layer in quantised.blocks.named_modules():
        if isinstance(layer, WholeNumberLinear):
            weight = rounded.blocks.get_submodule(name).get_parameter("weight").data
            step = weight.abs().amax(dim=1, keepdim=True) / 127.5
            assert bool(((layer.multiply(torch.eye(layer.in_features)).T - weight).abs() <= step).all()), name
            weight.copy_(layer.multiply(torch.eye(layer.in_features)).T.contiguous())
    options = SamplingOptions(temperature=0.9, top_k=20, guidance=2.0)
    found = generate_codes(quantised, PROMPTS[:8], SEEDS[:8], options, grid=GRID)
    assert float((found == generate_codes(rounded, PROMPTS[:8], SEEDS[:8], options, grid=GRID)).double().mean()) > 0.9
    for k in (0, 3, 7):
        assert torch.equal(generate_codes(quantised, [PROMPTS[k]], [SEEDS[k]], options, grid=GRID)[0], found[k])


def test_without_the_product_weights_stay_as_they_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(numbers: Tensor, scales: Tensor) -> None:
        raise RuntimeError("no such product")

    monkeypatch.setattr(whole_numbers, "_packed", missing)
    assert not multiplies_whole_numbers.__wrapped__()
    monkeypatch.setattr(int8, "multiplies_whole_numbers", lambda: False)
    quantised = quantise(make_model(PRESETS["modern"]))
    assert is_quantised(quantised)
    assert not any(isinstance(layer, WholeNumberLinear) for layer in quantised.modules())
