"""Sampling pictures: prefill, then one code at a time with a KV cache.

Image k is the same picture, bit for bit, whatever else is in the batch (on one device, dtype and thread count):
* all its random numbers come from its own CPU generator, drawn before the first step: a code is the argmax of its
  logits and of noise that belongs to the seed and the place, so no library's sampling order matters;
* floating-point products may add up in another order when a matrix has another shape, so the model only ever sees
  blocks of `full_block` rows, with every prompt padded to the model's `max_text` on the left. Unused rows are filled.
  A block for few images is smaller where a trial on this CPU finds the same bits in it (`block_rows`).

Shapes: n images, R rows of a block, P prompt slots, N image codes, S = h * w codes of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.drawing.engines import Engine, Kind, cache_dtype, make_cache, make_step
from generation.drawing.jacobi import WindowCache, draw_by_windows
from generation.drawing.logits import draw_noise, guide, sample
from generation.drawing.ragged_cache import RaggedCache
from generation.drawing.sampling import SamplingOptions
from generation.rows.draw import prompt_row, row_positions
from generation.rows.row import COMMANDS_IN_ROW
from generation.transformer.cache import KVCache
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer

BLOCK_ROWS = 16  # a guided image takes two of them
SMALL_BLOCKS = (2, 4, 8)
MOST_CACHED = 2**31  # numbers in a block's cache: 4 GiB in bfloat16

OnToken = Callable[[int, Tensor], None]


def prefill(model: Transformer, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
    """Fill the cache with `tokens` [R, T]; float32 logits [R, N] of the first code after them.

    On a CPU every row goes by itself, equal ones once: that makes its bits its own, and costs nothing there.
    """
    if isinstance(cache, RaggedCache):
        hidden = model(cache.align(tokens), cache.align(positions), cache)
        rows = torch.arange(len(tokens), device=tokens.device)
        return model.logits(hidden[rows, tokens.shape[1] - 1 - cache.padding], image_only=True).float()
    if tokens.device.type != "cpu":
        return model.logits(model(tokens, positions, cache)[:, -1], image_only=True).float()
    logits: dict[tuple[int, ...], tuple[int, Tensor]] = {}  # of a row's tokens: the first such row, and what follows
    results = []
    for row, key in enumerate(map(tuple, tokens.tolist())):
        if key in logits:
            cache.copy_row(logits[key][0], row)
        else:
            hidden = model(tokens[row : row + 1], positions[row : row + 1], cache.row(row))
            logits[key] = row, model.logits(hidden[:, -1], image_only=True).float()
        results.append(logits[key][1])
    cache.advance(tokens.shape[1])
    return torch.cat(results)


def count_steps(
    n: int, options: SamplingOptions, grid: tuple[int, int] = (16, 16), prefix: int = 0, rows: int = BLOCK_ROWS
) -> int:
    """How many steps `generate_codes` counts for `on_token`, of `n` images that all begin with `prefix` given codes.

    `rows` is the model's `full_block`.
    """
    return math.ceil(n / _images_in_block(options, rows)) * (grid[0] * grid[1] - prefix)


@torch.inference_mode()
def generate_codes(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    options: SamplingOptions | None = None,
    *,
    grid: tuple[int, int] = (16, 16),
    given_codes: Tensor | None = None,
    on_token: OnToken | None = None,
    engine: Engine | None = None,
) -> Tensor:
    """Codes [n, h, w] int64, one picture a prompt (raw text pieces) and seed, on the model's device.

    `given_codes` [n, h, w] are kept wherever they are not -1. A code is drawn in sight of what comes before it in
    raster order, and so not of the given codes behind it. `on_token(step, codes)` is called after every step, from 1
    to `count_steps` (with a window after every pass, which is several steps), with the codes [n, h, w] so far, -1 where
    none is known yet; the tensor is the one being filled, so copy what you keep, and raise an exception to stop. The
    `engine` says how a step is run; a window is always drawn by the modules. Raises `ValueError` for arguments that do
    not fit together.
    """
    options, engine = options or SamplingOptions(), engine or Engine()
    kind = engine.resolved(model)
    full = full_block(model.config, grid)
    if engine.images:
        full = engine.images * (1 if options.guidance == 1 else 2)
    size = _images_in_block(options, full)
    device = model.embed.weight.device
    codes = _given(model.config, prompts, seeds, grid, given_codes).to(device)
    prefix = int((codes >= 0).all(dim=0).int().cumprod(dim=0).sum())  # given in all pictures: no step is needed
    if prefix == grid[0] * grid[1]:
        return codes.view(-1, *grid)
    done = 0  # steps of the blocks before

    def report(known: int) -> None:
        if on_token is not None:
            on_token(done + known - prefix, codes.view(-1, *grid))

    training = model.training
    model.eval()
    try:
        for first in range(0, len(prompts), size):
            last = min(first + size, len(prompts))
            rows = full
            if not engine.images:
                rows = block_rows(model, (last - first) * full // size, grid, options.window, kind)
            fill = [first] * (rows * size // full - (last - first))
            images = [*range(first, last), *fill]
            _generate_block(model, [prompts[i] for i in images], [seeds[i] for i in images], options, grid,
                            codes[first:last], prefix, report, kind)  # fmt: skip
            done += grid[0] * grid[1] - prefix
    finally:
        model.train(training)
    return codes.view(-1, *grid)


def cache_shape(config: TransformerConfig, rows: int, grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """Layers, rows, slots and width of the keys (and of the values) that drawing keeps."""
    return config.depth, rows, config.max_text + COMMANDS_IN_ROW + grid[0] * grid[1] - 2, config.width


def full_block(config: TransformerConfig, grid: tuple[int, int]) -> int:
    """The rows of a full block: `BLOCK_ROWS`, halved until the cache holds at most `MOST_CACHED` numbers; 2 at least.

    The model decides, not the memory that is free: a picture would differ between two cards.
    """
    rows = BLOCK_ROWS
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
            shape = replace(model.config, tokenizer_hash="", text_hash="")
            key = (repr(shape), model.embed.weight.dtype, torch.get_num_threads(), rows, most, grid, window, kind)
            if key not in _trials:
                full, small = _trial(model, most, grid, window, kind), _trial(model, rows, grid, window, kind)
                _trials[key] = bool((full == full[:1]).all() and (small == full[:1]).all())
            if _trials[key]:
                return rows
    return most


_trials: dict[tuple[object, ...], bool] = {}


def _trial(model: Transformer, rows: int, grid: tuple[int, int], window: int, kind: Kind) -> Tensor:
    """What `rows` times the same row computes [rows, ...]: its linear layers on sums that cancel, then its logits."""
    config = model.config
    text = [i % config.num_text_pieces for i in range(config.max_text)]
    tokens, hidden, positions = _left_padded(config, [text] * rows, grid)
    slots, window = tokens.shape[1], min(window, grid[0] * grid[1])
    last = hidden.shape[1] - window
    linear = {(m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    results = []
    for inputs, outputs in sorted(linear | {(config.width, config.num_image_codes)}):
        if kind == "fused" and window == 1:
            x, weight, _ = _cancelling(inputs, outputs, False, torch.float32)
            results.append(x.expand(rows, inputs).contiguous() @ weight.t().contiguous())
        else:
            x, weight, bias = _cancelling(inputs, outputs, config.bias, model.embed.weight.dtype)
            for length in (window, slots) if window > 1 else (1,):
                y = F.linear(x.expand(rows, length, inputs).contiguous(), weight, bias)
                results.append(y.flatten(1).float())
    codes = torch.zeros(rows, window, dtype=torch.int64)
    places = sorted({0, (last - slots) // 2, last - slots} & set(range(last - slots + 1)))  # a single code: no step
    if window > 1:
        windows = WindowCache(config, hidden, dtype=torch.float32, device="cpu")
        results.append(model.logits(model(tokens, positions[:, :slots], windows)[:, -1], image_only=True).float())
        for place in places:
            windows.starts = torch.full((rows,), slots + place)
            here = positions[:, slots + place : slots + place + window]
            results.append(model.logits(model(codes, here, windows), image_only=True).float().flatten(1))
    else:
        cache = make_cache(kind, model, hidden)
        prefill(model, tokens, positions[:, :slots], cache)
        step = make_step(kind, model, positions[:, slots:], cache)
        for place in places:
            cache.used = slots + place
            results.append(step(codes[:, 0], place).clone())
    return torch.cat(results, dim=1)


def _cancelling(inputs: int, outputs: int, with_bias: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [inputs], weight [outputs, inputs] and bias whose exact product is 0, so that all it gives is rounding error.

    That error shows the order of a sum, which rounding an ordinary result to bfloat16 mostly hides.
    """
    generator = torch.Generator().manual_seed(0)
    half, order = inputs // 2, torch.randperm(inputs, generator=generator)
    x, weight = torch.zeros(inputs), torch.zeros(outputs, inputs)
    x[order[:half]] = torch.randn(half, generator=generator)
    weight[:, order[:half]] = torch.randn(outputs, half, generator=generator)
    x[order[half : 2 * half]] = x[order[:half]]
    weight[:, order[half : 2 * half]] = -weight[:, order[:half]]
    return x.to(dtype), weight.to(dtype), torch.zeros(outputs, dtype=dtype) if with_bias else None


def _generate_block(
    model: Transformer,
    prompts: list[Sequence[int]],
    seeds: list[int],
    options: SamplingOptions,
    grid: tuple[int, int],
    codes: Tensor,
    prefix: int,
    report: Callable[[int], None],
    kind: Kind,
) -> None:
    """Fill the gaps (-1) of `codes` [m, S], none before the column `prefix`, by the first m prompts and seeds.

    `report` is told how many codes of each are known.
    """
    config, device = model.config, codes.device
    steps = grid[0] * grid[1]
    guided = options.guidance != 1
    rows = [*prompts, *([[]] * len(prompts) if guided else [])]
    tokens, hidden, positions = _left_padded(config, rows, grid)
    tokens, positions = tokens.to(device), positions.to(device)
    noise = torch.empty(len(seeds), steps, config.num_image_codes, device=device)
    for row, seed in enumerate(seeds):
        first = seeds.index(seed)  # unused rows repeat an image
        noise[row] = draw_noise(seed, steps, config.num_image_codes) if first == row else noise[first]

    slots = tokens.shape[1]
    count = codes.shape[0]
    given = codes[[*range(count), *([0] * (len(prompts) - count))]]  # unused rows repeat the first image
    if options.window > 1:
        images = torch.arange(len(prompts), device=device)[:, None]

        def choose(logits: Tensor, places: Tensor) -> Tensor:
            logits = guide(logits, options.guidance) if guided else logits
            return sample(logits, noise[images, places], options)

        def on_pass(known: int) -> None:
            codes.copy_(given[:count])
            report(known)

        windows = WindowCache(config, hidden, dtype=cache_dtype(model), device=device)
        draw_by_windows(model, windows, tokens, positions, given, options.window, grid[1], choose, on_pass)
        return
    cache = make_cache(kind, model, hidden)
    prompt = torch.cat([tokens, given[:, :prefix].repeat(2 if guided else 1, 1)], dim=1)
    logits = prefill(model, prompt, positions[:, : slots + prefix], cache)
    step = make_step(kind, model, positions[:, slots:], cache)
    for place in range(prefix, steps):
        if guided:
            logits = guide(logits, options.guidance)
        token = torch.where(given[:, place] < 0, sample(logits, noise[:, place], options), given[:, place])
        codes[:, place] = token[:count]
        report(place + 1)
        if place + 1 < steps:
            logits = step(token.repeat(2) if guided else token, place)


def _left_padded(
    config: TransformerConfig, prompts: Sequence[Sequence[int]], grid: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt tokens [R, P], padding of the cache [R, P + S - 1] (True: nothing there), positions [R, P + S(, 2)].

    The padding is on the left, so that [BOI1] and every code have the same slot in all rows. Positions count from the
    row's own first token, as in training.
    """
    vocab, slots = config.vocabulary, config.max_text + COMMANDS_IN_ROW - 1
    steps = grid[0] * grid[1]
    tokens = torch.full((len(prompts), slots), vocab.command("[PAD]"))
    hidden = torch.zeros(len(prompts), slots + steps - 1, dtype=torch.bool)
    axes = () if config.position_kind == "sequence" else (2,)
    positions = torch.zeros(len(prompts), slots + steps, *axes, dtype=torch.int64)
    for i, text in enumerate(prompts):
        row = prompt_row(vocab, text, grid, config.max_text)
        padding = slots - len(row)
        tokens[i, padding:] = torch.tensor(row)
        hidden[i, :padding] = True
        num_text = len(row) + 1 - COMMANDS_IN_ROW
        positions[i, padding:] = row_positions(num_text, grid, config.max_text, config.position_kind)[:-1]
    return tokens, hidden, positions


@torch.inference_mode()
def naive_generate_codes(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    options: SamplingOptions | None = None,
    *,
    grid: tuple[int, int] = (16, 16),
    given_codes: Tensor | None = None,
) -> Tensor:
    """What `generate_codes` must agree with: no cache, no padding, no batch; the whole row again for every code."""
    options = options or SamplingOptions()
    given = _given(model.config, prompts, seeds, grid, given_codes)
    device = model.embed.weight.device
    pictures = []
    for row, text, seed in zip(given.tolist(), prompts, seeds, strict=True):
        codes: list[int] = []
        noise = draw_noise(seed, grid[0] * grid[1], model.config.num_image_codes).to(device)
        for code in row:
            if code >= 0:
                codes.append(code)
                continue
            logits = _naive_logits(model, text, codes, grid)
            if options.guidance != 1:
                logits = guide(torch.cat([logits, _naive_logits(model, [], codes, grid)]), options.guidance)
            codes.append(int(sample(logits, noise[len(codes)][None], options)))
        pictures.append(torch.tensor(codes, device=device).view(grid))
    return torch.stack(pictures)


def _naive_logits(model: Transformer, text: Sequence[int], codes: list[int], grid: tuple[int, int]) -> Tensor:
    config, device = model.config, model.embed.weight.device
    prompt = prompt_row(config.vocabulary, text, grid, config.max_text)
    row = torch.tensor([prompt + codes], device=device)
    num_text = len(prompt) + 1 - COMMANDS_IN_ROW
    positions = row_positions(num_text, grid, config.max_text, config.position_kind)[: row.shape[1]]
    hidden = model(row, positions.unsqueeze(0).to(device))
    return model.logits(hidden[:, -1], image_only=True).float()


def _images_in_block(options: SamplingOptions, rows: int) -> int:
    return rows if options.guidance == 1 else rows // 2


def _given(
    config: TransformerConfig,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    grid: tuple[int, int],
    given_codes: Tensor | None,
) -> Tensor:
    """A new tensor of the given codes [n, S], -1 where none is; `ValueError` for anything that does not fit."""
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"one seed a prompt is needed, and at least one: {len(prompts)} prompts, {len(seeds)} seeds")
    if min(grid) < 1 or grid[0] > config.grid[0] or grid[1] > config.grid[1]:
        raise ValueError(f"this model draws up to {config.grid[0]}x{config.grid[1]} codes, not {grid[0]}x{grid[1]}")
    if given_codes is None:
        return torch.full((len(prompts), grid[0] * grid[1]), -1)
    if tuple(given_codes.shape) != (len(prompts), *grid):
        raise ValueError(f"given_codes must be {[len(prompts), *grid]}, not {list(given_codes.shape)}")
    if not (given_codes.min() >= -1 and given_codes.max() < config.num_image_codes):
        raise ValueError(f"given_codes must lie in 0..{config.num_image_codes - 1}, or be -1 where one is to be drawn")
    return given_codes.to("cpu", torch.int64).flatten(1).clone()
