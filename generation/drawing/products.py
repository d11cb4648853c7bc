"""Products of few rows with a matrix on a CPU, with the same bits for a row however many rows there are.

A library chooses its kernel by the number of rows, and kernels add up in different orders: a row alone is a product of
a vector, and rows that do not fill a kernel's tile go through another one. So there are several ways here, and a trial
on this CPU says which is taken for a matrix of some shape: the first whose rows agree bit for bit in small and in full
blocks.

Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # [R, I] to [R, O], float32

MOST_ROWS = 16  # of a block (`generation.drawing.blocks`)
DISTINCT = 64  # outputs of a trial that have numbers of their own; the others repeat them


def packed_product(matrix: Tensor) -> Product:
    """By MKL, with the matrix [O, I] in MKL's own layout, which is read in the same order for one row as for sixteen.

    It is the operation that torch.compile takes for weights that are frozen. Of what MKL reserves, some 8 MB more than
    the matrix, it touches as much as the matrix has (Linux, measured). Raises `RuntimeError` without MKL.
    """
    packed = torch.ops.mkl._mkl_reorder_linear_weight(matrix.contiguous(), MOST_ROWS)
    # the operation falls back to the matrix itself for another number of rows than its last argument, so never here,
    # and otherwise takes only its shape
    shape = torch.empty(1).expand(matrix.shape)
    product = torch.ops.mkl._mkl_linear.default
    return lambda x: product(x, packed, shape, None, len(x))


def column_product(matrix: Tensor) -> Product:
    """By `mm`, with the matrix laid out [I, O], where far more numbers of rows agree than with `F.linear`."""
    columns = matrix.t().contiguous()
    return lambda x: x @ columns


def single_product(matrix: Tensor) -> Product:
    """Each row by itself, so that rows agree without a trial; slow for many."""
    columns = matrix.t().contiguous()
    return lambda x: torch.bmm(x.unsqueeze(1), columns.expand(len(x), *columns.shape)).squeeze(1)


def eight_bit_product(numbers: Tensor, scales: Tensor) -> Product:
    """By int8 `numbers` [O, I] as they are stored, with rows and results rounded to bfloat16; `scales` [O] float32.

    Its kernel adds up each result by itself, so rows agree. I and O must satisfy `multiplies_eight_bits`.
    """
    ones = torch.ones(len(numbers), dtype=torch.bfloat16)  # `scales` in bfloat16 would be off by up to 0.4 %
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), numbers, ones) * scales


def multiplies_eight_bits(inputs: int, outputs: int) -> bool:
    """Whether `eight_bit_product` supports the shape: its kernel reads past the end of rows of other lengths."""
    return inputs % 32 == 0 and outputs % 32 == 0


# the rows of blocks that have to agree; a single row goes as two, or as four, where it must
_CHOICES: list[tuple[Callable[[Tensor], Product], tuple[int, ...]]] = [
    (packed_product, (1, 4, 8)),
    (column_product, (1, 4, 8)),
    (column_product, (2, 4, 8)),
    (column_product, (4, 8)),
]
_ways: dict[tuple[int, int, int], Callable[[Tensor], Product]] = {}


def make_product(matrix: Tensor) -> Product:
    """The product with a float32 `matrix` [O, I], by the first of the ways whose rows agree on this CPU.

    A trial runs once for each shape and number of threads. Its outcome depends on the CPU and the libraries alone, not
    on how long anything took, so a seed draws the same picture in every process.
    """
    outputs, inputs = matrix.shape
    key = (inputs, outputs, torch.get_num_threads())
    if key not in _ways:
        _ways[key] = next((way for way, rows in _CHOICES if _agrees(way, inputs, outputs, rows)), single_product)
    return _ways[key](matrix)


def _agrees(way: Callable[[Tensor], Product], inputs: int, outputs: int, blocks: tuple[int, ...]) -> bool:
    """Whether all rows of `blocks` and of a full block have the same bits."""
    x, matrix = cancelling(inputs, outputs)
    try:
        product = way(matrix)
        results = [product(x.expand(rows, inputs).contiguous()) for rows in (*blocks, MOST_ROWS)]
    except (RuntimeError, AttributeError):  # this PyTorch has no MKL
        return False
    return all(bool((result == results[-1][:1]).all()) for result in results)


def cancelling(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """x [I] and a matrix [O, I] whose exact product is 0, so that all it gives is rounding error.

    That error shows the order of a sum, which rounding an ordinary result to bfloat16 mostly hides.
    """
    generator = torch.Generator().manual_seed(0)
    half, order = inputs // 2, torch.randperm(inputs, generator=generator)
    x, matrix = torch.zeros(inputs), torch.zeros(min(outputs, DISTINCT), inputs)
    x[order[:half]] = torch.randn(half, generator=generator)
    matrix[:, order[:half]] = torch.randn(len(matrix), half, generator=generator)
    x[order[half : 2 * half]] = x[order[:half]]
    matrix[:, order[half : 2 * half]] = -matrix[:, order[:half]]
    return x, matrix.repeat(-(-outputs // len(matrix)), 1)[:outputs]
