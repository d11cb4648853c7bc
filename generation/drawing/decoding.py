"""Sampling pictures: prefill, then one code at a time with a KV cache.

Image k is the same picture, bit for bit, whatever else is in the batch (on one device, dtype and thread count):
* all its random numbers come from its own CPU generator, drawn before the first step: a code is the argmax of its
  logits and of noise that belongs to the seed and the place, so no library's sampling order matters;
* the model only ever sees blocks of a fixed number of rows (`generation.drawing.blocks`), with every prompt padded to
  the model's `max_text` on the left. Unused rows are filled.

Shapes: n images, m images of a block, R rows of a block, N image codes, S = h * w codes of a picture, P places of it
(`generation.drawing.row_ends`), which are its codes in most models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from generation.drawing.blocks import BLOCK_ROWS, block_rows, blocks_together, full_block, images_in_block
from generation.drawing.engines import Engine, Kind, cache_dtype, make_cache, make_step
from generation.drawing.jacobi import Windows, draw_by_windows
from generation.drawing.logits import choice_scores, guide, sample
from generation.drawing.noise import Noise, make_noise
from generation.drawing.prompts import PaddedPrompts, pad_prompts, prefill, prefill_around_holes
from generation.drawing.row_ends import PictureRows
from generation.drawing.sampling import SamplingOptions
from generation.drawing.window_cache import WindowCache, branches_of
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer, evaluation

OnToken = Callable[[int, Tensor], None]
Report = Callable[[int], None]  # told how many codes of each picture of the block are known


@dataclass(frozen=True)
class DrawJob:
    """Pictures to be drawn: a prompt (raw text pieces, or a `Prompt`) and a seed each, and their `codes` [n, P].

    A code is -1 where there is a gap. No picture has a gap before the column `prefix`; with `around_holes`, all have
    the same gaps, and only these take steps. In a block there may be more prompts and seeds than codes: those of unused
    rows, which repeat the first image.
    """

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    codes: Tensor
    rows: PictureRows
    options: SamplingOptions
    prefix: int
    alone: bool = False  # whether no other picture is ever in a block
    around_holes: bool = False

    @property
    def steps(self) -> int:
        """P: places of a picture."""
        return self.codes.shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the pictures in codes."""
        return self.rows.grid

    @property
    def known(self) -> int:
        """Places of each picture that take no step."""
        return int((self.codes[0] >= 0).sum()) if self.around_holes else self.prefix

    @property
    def guided(self) -> bool:
        """Whether every image has a second row, without its prompt."""
        return self.options.guidance != 1

    @property
    def given(self) -> Tensor:
        """A copy of the codes, a row for each prompt."""
        count = len(self.codes)
        return self.codes[[*range(count), *([0] * (len(self.prompts) - count))]]

    def block(self, first: int, last: int, size: int) -> DrawJob:
        """The images from `first` to `last`, with `size` prompts and seeds; it fills the same memory of `codes`."""
        images = [*range(first, last), *[first] * (size - (last - first))]
        prompts, seeds = [self.prompts[i] for i in images], [self.seeds[i] for i in images]
        return replace(self, prompts=prompts, seeds=seeds, codes=self.codes[first:last])


def count_steps(
    n: int, options: SamplingOptions, grid: tuple[int, int] = (16, 16), known: int = 0, rows: int = BLOCK_ROWS
) -> int:
    """How many steps `generate_codes` counts for `on_token`, of `n` images with `known` codes (see `known_codes`).

    `rows` is the model's `full_block`.
    """
    return math.ceil(n / images_in_block(options, rows)) * (grid[0] * grid[1] - known)


def known_codes(given: Tensor, fills: bool) -> int:
    """How many of the codes that are `given` (bool [h, w]) take no step.

    All of them where the model fills holes (`TransformerConfig.fills`); else those that the picture begins with.
    """
    places = given.flatten().int()
    return int(places.sum() if fills else places.cumprod(dim=0).sum())


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
    """Codes [n, h, w] int64, one picture a prompt (raw text pieces, or a `Prompt`) and seed, on the model's device.

    `given_codes` [n, h, w] are kept wherever they are not -1. A code is drawn in sight of what comes before it in
    raster order, and so not of the given codes behind it, unless the model was trained to fill holes
    (`TransformerConfig.fills`): then of all given codes, only the others take steps, and they must be the same in all
    pictures. `on_token(step, codes)` is called after every step, from 1 to `count_steps` (with a window after every
    pass, which is several steps; one of two blocks drawn at once is two), with the codes [n, h, w] so far, -1 where
    none is known yet; the tensor is the one being filled, so copy what you keep, and raise an exception to stop. The
    `engine` says how a step is run; a window is always drawn by the modules. Raises `ValueError` for what does not fit.
    """
    options, engine = options or SamplingOptions(), engine or Engine()
    kind = engine.resolved(model)
    full = full_block(model.config, grid)
    if engine.images:
        full = engine.images * (1 if options.guidance == 1 else 2)
    size = images_in_block(options, full)
    picture_rows = PictureRows.of(model.config, grid)
    codes = picture_rows.spread(_given(model.config, prompts, seeds, grid, given_codes)).to(model.embed.weight.device)
    prefix = int((codes >= 0).all(dim=0).int().cumprod(dim=0).sum())  # given in all pictures: no step is needed
    around_holes = model.config.fills and bool((codes >= 0).any())
    if around_holes and bool(((codes < 0) != (codes[0] < 0)).any()):
        raise ValueError("pictures with holes in different places: draw them in different calls")
    if around_holes:  # windows and recorded steps go by raster order
        options, kind = replace(options, window=1), "fused" if kind == "fused" else "modules"
    job = DrawJob(prompts, seeds, codes, picture_rows, options, prefix, alone=size == 1, around_holes=around_holes)
    known_before = job.known
    if known_before == job.steps:
        return picture_rows.pictures(codes)
    done, together = 0, 1  # steps of the blocks before; blocks at once
    given_before, steps = picture_rows.codes_before(known_before), grid[0] * grid[1]

    def report(known: int) -> None:
        if on_token is not None:
            on_token(done + together * (picture_rows.codes_before(known) - given_before), picture_rows.pictures(codes))

    # in the weights' own type, whatever the training around computes in: packed weights have one type
    with evaluation(model), torch.autocast(codes.device.type, enabled=False):
        first = 0
        while first < len(prompts):
            rows, together = full, 1
            # a picture alone in a block has the padding that its own prompt needs, which another would change
            if not (engine.images or job.alone) and first + 2 * size <= len(prompts):
                together = blocks_together(model, grid, options.window, kind)
            last = min(first + together * size, len(prompts))
            if not engine.images and together == 1:
                rows = block_rows(model, (last - first) * full // size, grid, options.window, kind)
            _draw_block(model, job.block(first, last, together * rows * size // full), kind, report)
            first, done = last, done + together * (steps - given_before)
    return picture_rows.pictures(codes)


def _draw_block(model: Transformer, block: DrawJob, kind: Kind, report: Report) -> None:
    """Fill the gaps of a block's codes."""
    device, frame = block.codes.device, model.config.frame
    rows = [*block.prompts, *(map(frame.unprompted, block.prompts) if block.guided else [])]
    # the rows of a picture alone decide how much padding it needs; what is recorded keeps its shape
    tight = block.alone and frame.own and kind in ("modules", "fused")
    prompts = pad_prompts(model.config, rows, block.grid, tight=tight).to(device)
    steps, num_codes = block.grid[0] * block.grid[1], model.config.num_image_codes
    noise = make_noise(model.config.noise, block.seeds, steps, num_codes, device)
    if block.around_holes:
        _draw_holes(model, block, prompts, noise, kind, report)
    elif block.options.window > 1:
        _draw_by_windows(model, block, prompts, noise, report)
    else:
        _draw_by_steps(model, block, prompts, noise, kind, report)


def _draw_by_windows(model: Transformer, block: DrawJob, prompts: PaddedPrompts, noise: Noise, report: Report) -> None:
    codes, given, options = block.codes, block.given, block.options

    def score(logits: Tensor, places: Tensor) -> Tensor:
        logits = guide(logits, options.guidance) if block.guided else logits
        return choice_scores(logits, noise.among(block.rows.code_numbers(places)), options)

    def on_pass(known: int) -> None:
        codes.copy_(given[: len(codes)])
        report(known)

    branches = branches_of(min(options.window, block.steps))
    cache = WindowCache(model.config, prompts.hidden, dtype=cache_dtype(model), device=codes.device, branches=branches)
    draw_by_windows(model, cache, prompts, given, Windows(options.window, block.rows.stride, score, on_pass))


def _draw_by_steps(
    model: Transformer, block: DrawJob, prompts: PaddedPrompts, noise: Noise, kind: Kind, report: Report
) -> None:
    codes, given, options = block.codes, block.given, block.options
    repeats = 2 if block.guided else 1
    cache = make_cache(kind, model, prompts.hidden)
    logits = prefill(model, prompts, cache, given[:, : block.prefix].repeat(repeats, 1))
    step = make_step(kind, model, prompts.code_positions, cache)
    for place in range(block.prefix, block.steps):
        token = given[:, place]
        if not block.rows.is_end(place):
            logits = guide(logits, options.guidance) if block.guided else logits
            drawn = sample(logits, noise.at(block.rows.codes_before(place)), options)
            token = torch.where(token < 0, drawn, token)
            codes[:, place] = token[: len(codes)]
            report(place + 1)
        if place + 1 < block.steps:
            logits = step(token.repeat(repeats), place)


def _draw_holes(
    model: Transformer, block: DrawJob, prompts: PaddedPrompts, noise: Noise, kind: Kind, report: Report
) -> None:
    """Code by code, of the holes alone."""
    codes, given, options = block.codes, block.given, block.options
    repeats, known = 2 if block.guided else 1, block.known
    hidden = given[0] < 0
    cache = make_cache(kind, model, prompts.hidden)
    firsts = prefill_around_holes(model, prompts, cache, given.repeat(repeats, 1), hidden)
    step = make_step(kind, model, prompts.code_positions, cache)
    logits = torch.empty(0)
    for count, place in enumerate(hidden.nonzero()[:, 0].tolist(), start=1):
        logits = firsts.get(place, logits)
        token = sample(guide(logits, options.guidance) if block.guided else logits, noise.at(place), options)
        codes[:, place] = token[: len(codes)]
        report(known + count)
        if known + count < block.steps:
            logits = step(token.repeat(repeats), place)


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
