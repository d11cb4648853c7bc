"""Products whose rows have the same bits however many there are, on the CPU that the tests run on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from generation.drawing import products
from generation.drawing.products import (
    MOST_ROWS,
    cancelling,
    column_product,
    eight_bit_product,
    make_product,
    multiplies_eight_bits,
    packed_product,
    single_product,
)

SHAPES = [(256, 768), (704, 256), (64, 192), (192, 500), (100, 77), (1, 1)]


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_product_is_the_product(inputs, outputs):
    torch.manual_seed(0)
    matrix = torch.randn(outputs, inputs)
    for rows in (1, 3, MOST_ROWS):
        x = torch.randn(rows, inputs)
        for way in (make_product, column_product, single_product):
            torch.testing.assert_close(way(matrix)(x), x @ matrix.t(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_full_blocks_and_those_of_four_and_eight_agree_in_all_rows(inputs, outputs):
    torch.manual_seed(0)
    x, product = torch.randn(MOST_ROWS, inputs), make_product(torch.randn(outputs, inputs))
    full = product(x)
    for rows in (4, 8):
        assert torch.equal(product(x[:rows]), full[:rows])
        assert torch.equal(product(x[-rows:]), full[-rows:]), "the place in a block does not matter"


def test_rows_one_by_one_agree_everywhere():
    x, matrix = cancelling(192, 64)
    product = single_product(matrix)
    results = {rows: product(x.expand(rows, 192).contiguous()) for rows in range(1, MOST_ROWS + 1)}
    assert all((result == results[1]).all() for result in results.values())


def test_a_trial_sees_another_order_of_the_sum():
    """Its sums cancel: what is left depends on the order alone."""
    x, matrix = cancelling(256, 300)
    assert matrix.shape == (300, 256)
    forwards, backwards = x @ matrix.t(), x.flip(0) @ matrix.flip(1).t()
    assert 0 < forwards.abs().max() < 1e-4
    assert not torch.equal(forwards, backwards)


def test_without_a_way_that_agrees_rows_go_one_by_one(monkeypatch):
    tried = []

    def unequal(matrix):
        tried.append(matrix.shape)
        return lambda x: torch.full((len(x), len(matrix)), float(len(x)))

    def missing(matrix):
        raise RuntimeError("no MKL")

    monkeypatch.setattr(products, "_ways", {})
    monkeypatch.setattr(products, "_CHOICES", [(missing, (1,)), (unequal, (1, 4)), (unequal, (4, 8))])
    make_product(torch.zeros(8, 6))
    make_product(torch.ones(8, 6))
    assert tried == [(8, 6)] * 2, "one trial a way and shape"
    assert list(products._ways.values()) == [single_product]


CPU = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
REAL_SHAPES = ((256, 768), (256, 256), (256, 1408), (704, 256), (256, 1024))


@pytest.mark.parametrize("shape", REAL_SHAPES)
def test_rows_of_a_real_models_shapes_agree_on_this_cpu(shape):
    x, matrix = cancelling(*shape)
    product = make_product(matrix)
    full = product(x.expand(MOST_ROWS, len(x)).contiguous())
    assert full.abs().max() > 0
    for rows in (4, 8):  # a single row may go as four
        assert (product(x.expand(rows, len(x)).contiguous()) == full[:1]).all()


@pytest.mark.skipif(
    not torch.backends.mkl.is_available() or "GenuineIntel" not in CPU,
    reason="needs MKL on a CPU of Intel's: on a Zen 4 it takes a single row otherwise",
)
def test_mkl_takes_a_single_row_as_it_takes_a_full_block_of_a_real_models_shapes():
    for inputs, outputs in REAL_SHAPES:
        x, matrix = cancelling(inputs, outputs)
        product = packed_product(matrix)
        full = product(x.expand(MOST_ROWS, inputs).contiguous())
        assert (product(x[None]) == full).all()


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 192), (704, 256), (96, 32)])
def test_eight_bits_are_right_and_agree(inputs, outputs):
    assert multiplies_eight_bits(inputs, outputs)
    torch.manual_seed(0)
    numbers, scales = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), torch.rand(outputs) / 100
    x = torch.randn(MOST_ROWS, inputs)
    product = eight_bit_product(numbers, scales)
    expected = x @ (numbers * scales[:, None]).t()
    assert (product(x) - expected).abs().max() < 0.01 * expected.abs().max()
    for rows in range(1, MOST_ROWS):
        assert torch.equal(product(x[:rows]), product(x)[:rows])


def test_eight_bits_of_odd_shapes_are_left_alone():
    assert not multiplies_eight_bits(100, 64)
    assert not multiplies_eight_bits(64, 77)
