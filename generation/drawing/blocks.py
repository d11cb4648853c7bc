"""How many rows the model sees at once, so that a picture has the same bits in any company.

Floating-point products may add up in another order when a matrix has another shape. So rows come in blocks of a fixed
number, `full_block`; a smaller block (`block_rows`), and two full ones at once (`blocks_together`), are used only where
a trial on this CPU finds the same bits in them.

Shapes: R rows of a block, P prompt slots, S = h * w codes of a picture.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data.host_memory import free_host_bytes
from generation.drawing.engines import Kind, make_cache, make_step
from generation.drawing.products import MOST_ROWS, cancelling, make_product
from generation.drawing.prompts import pad_prompts, prefill
from generation.drawing.sampling import SamplingOptions
from generation.drawing.window_cache import WindowCache, branches_of
from generation.rows.row import COMMANDS_IN_ROW
from generation.transformer.config import TransformerConfig
from generation.transformer.int8 import is_quantised
from generation.transformer.model import Transformer

BLOCK_ROWS = MOST_ROWS  # a guided image takes two of them
SMALL_BLOCKS = (1, 2, 4, 6, 8, 12)
MOST_CACHED = 2**31  # numbers in a block's cache: 4 GiB in bfloat16
MOST_TOGETHER = 2**24  # numbers in a full block's cache, for two blocks at once: 64 MiB in float32
SPARE = 16  # times the cache of such a block must be free


def cache_shape(config: TransformerConfig, rows: int, grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """Layers, rows, slots and width of the keys (and of the values) that drawing keeps."""
    slots = config.max_text + COMMANDS_IN_ROW + config.places(grid) - 2
    return config.depth, rows, slots, config.key_heads * config.head_width


def full_block(config: TransformerConfig, grid: tuple[int, int]) -> int:
    """The rows of a full block: the model's, halved until the cache holds at most `MOST_CACHED` numbers; 2 at least.

    The model decides, not the memory that is free: a picture would differ between two cards.
    """
    rows = config.block_rows
    while rows > 2 and 2 * math.prod(cache_shape(config, rows, grid)) > MOST_CACHED:
        rows //= 2
    return rows


def block_rows(model: Transformer, needed: int, grid: tuple[int, int], window: int = 1, kind: Kind = "modules") -> int:
    """The rows of a block for `needed` of them: `full_block`, or fewer if this CPU then computes the same bits.

    A trial tells: does every row of a small block, and of a full one, get what the first row of a full block gets?
    It runs once for each model shape, dtype, thread count, window and way of running a step.
    """
    most = full_block(model.config, grid)
    if model.embed.weight.device.type != "cpu":
        return most  # a step of few rows is no faster there
    for rows in SMALL_BLOCKS:
        if needed <= rows < most:
            full = _row_of(model, most, grid, window, kind)
            if full is None:
                break
            small = _row_of(model, rows, grid, window, kind)
            if small is not None and bool((small == full).all()):
                return rows
    return most


def blocks_together(model: Transformer, grid: tuple[int, int], window: int = 1, kind: Kind = "modules") -> int:
    """How many full blocks are drawn at once where there are as many: 2 if this CPU then computes the same bits, or 1.

    A step of a small model mostly reads its weights, which two blocks do once. The plan of the memory knows one block:
    the second is drawn only where it is small and much more is free.
    """
    most = full_block(model.config, grid)
    cached = 2 * math.prod(cache_shape(model.config, most, grid))
    free = free_host_bytes()
    if model.embed.weight.device.type != "cpu" or window > 1 or kind not in ("modules", "fused"):
        return 1
    if cached > MOST_TOGETHER or (free is not None and free < SPARE * 4 * cached):
        return 1
    one, two = (_row_of(model, rows, grid, window, kind) for rows in (most, 2 * most))
    return 2 if one is not None and two is not None and bool((one == two).all()) else 1


def images_in_block(options: SamplingOptions, rows: int) -> int:
    """Pictures in a block of so many rows: guidance takes two rows for each."""
    return rows if options.guidance == 1 else rows // 2


_trials: dict[tuple[object, ...], Tensor | None] = {}


def _row_of(model: Transformer, rows: int, grid: tuple[int, int], window: int, kind: Kind) -> Tensor | None:
    """What each row of a block of so many computes in the trial; None if they do not compute the same."""
    shape = replace(model.config, tokenizer_hash="", text_hash="")
    numbers = (model.embed.weight.dtype, is_quantised(model), torch.get_num_threads())
    key = (repr(shape), numbers, rows, grid, window, kind)
    if key not in _trials:
        found = _trial(model, rows, grid, window, kind)
        _trials[key] = found[0].clone() if bool((found == found[:1]).all()) else None
    return _trials[key]


def _trial(model: Transformer, rows: int, grid: tuple[int, int], window: int, kind: Kind) -> Tensor:
    """What `rows` times the same row computes [rows, ...]: its linear layers on sums that cancel, then its logits."""
    config = model.config
    text = [i % config.num_text_pieces for i in range(config.max_text)]
    prompts = pad_prompts(config, [text] * rows, grid)
    slots, window = prompts.slots, min(window, config.places(grid))
    last = prompts.hidden.shape[1] - window
    results = _trial_products(model, rows, (window, slots) if window > 1 else (1,), kind)
    codes = torch.zeros(rows, window, dtype=torch.int64)
    places = sorted({0, (last - slots) // 2, last - slots} & set(range(last - slots + 1)))  # a single code: no step
    if window > 1:
        branches = branches_of(window)
        windows = WindowCache(config, prompts.hidden, dtype=torch.float32, device="cpu", branches=branches)
        read = model(prompts.tokens, prompts.positions[:, :slots], windows)
        results.append(model.logits(read[:, -1], image_only=True).float())
        if branches:
            windows.branch_at(torch.arange(branches).expand(rows, -1))
        for place in places:
            windows.starts = torch.full((rows,), slots + place)
            here = prompts.positions[:, slots + place : slots + place + window]
            results.append(model.logits(model(codes, here, windows), image_only=True).float().flatten(1))
    else:
        cache = make_cache(kind, model, prompts.hidden)
        prefill(model, prompts, cache)
        step = make_step(kind, model, prompts.code_positions, cache)
        for place in places:
            cache.used = slots + place
            results.append(step(codes[:, 0], place).clone())
    return torch.cat(results, dim=1)


def _trial_products(model: Transformer, rows: int, lengths: tuple[int, ...], kind: Kind) -> list[Tensor]:
    """Outputs [rows, ...] of the linear layers, for tokens of those lengths, on sums that cancel."""
    config = model.config
    linear = {(m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    results = []
    for inputs, outputs in sorted(linear | {(config.width, config.num_image_codes)}):
        x, weight = cancelling(inputs, outputs)
        if kind == "fused" and lengths == (1,):
            results.append(make_product(weight)(x.expand(rows, inputs).contiguous()))
        else:
            x, weight = x.to(model.embed.weight.dtype), weight.to(model.embed.weight.dtype)
            bias = torch.zeros(outputs, dtype=weight.dtype) if config.bias else None
            for length in lengths:
                y = F.linear(x.expand(rows, length, inputs).contiguous(), weight, bias)
                results.append(y.flatten(1).float())
    return results
