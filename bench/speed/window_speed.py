"""Passes of the model and seconds for a picture, by the window of codes tried at once (`generation/drawing/jacobi.py`).

    python -m bench.speed.window_speed [--model emoji] [--windows 1 8 16 32 64] [--batches 1 8]
    python -m bench.speed.window_speed --janus 256 4 [--sharpness 12]

For each window the same pictures, at temperature 1 with the model's top-k and guidance; `same` is the share of codes
that equal those of window 1, as rounding may turn a near tie. Last the passes that the rule of Teng et al. (2024) takes
for the first prompt, with fresh noise for what it rejects. The last line is JSON; seconds are medians.

`--janus WIDTH LAYERS` draws with random weights in the row of Janus-1B instead: 576 codes of 16384, guidance 5, one
prompt of 30 pieces. What an untrained model draws says nothing of a trained one; `--sharpness` multiplies what the
codes' logits are made by, as flat ones would let the noise alone choose.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from bench.speed.janus_speed import GUIDANCE, PROMPT, SIDE, shape
from generation.drawing.decoding import generate_codes
from generation.drawing.logits import filter_logits, guide
from generation.drawing.sampling import SamplingOptions
from generation.rows.draw import training_row
from generation.transformer.model import Transformer
from mmwudao.pipeline import load

PROMPTS = ["戴墨镜的笑脸", "a red apple", "ein schlafendes Gesicht", "un cœur rouge", "猫", "pes", "꽃", "国旗"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--janus", type=int, nargs=2, metavar=("WIDTH", "LAYERS"))
    parser.add_argument("--sharpness", type=float, default=12.0)
    arguments = parser.parse_args()
    if arguments.janus:
        width, layers = arguments.janus
        model, options, grid = random_janus(width, layers, arguments.sharpness), JANUS, (SIDE, SIDE)
        texts: Sequence[Sequence[int]] = [[7 + k] * PROMPT for k in range(len(PROMPTS))]
    else:
        pipe = load(arguments.model, arguments.device, arguments.dtype)
        model, grid = pipe.generator, pipe.grid
        texts = [pipe.encode_prompt(prompt) for prompt in PROMPTS]
        options = replace(pipe.config.default_sampling, temperature=1.0, window=1)
    counter = CountPasses(model)
    rows: list[dict[str, float]] = []
    plain: dict[int, tuple[float, torch.Tensor]] = {}
    print(f"{'batch':>5} {'window':>6} {'passes':>7} {'seconds':>8} {'gain':>6} {'same':>6}")
    for batch in arguments.batches:
        for window in arguments.windows:
            passes, seconds, codes = [], [], []
            for run in range(arguments.runs + 1):  # the first finds out how small a block may be
                chosen = [(run + k) % len(texts) for k in range(batch)]
                counter.passes, started = 0, time.perf_counter()
                found = generate_codes(
                    model, [texts[k] for k in chosen], [run * 100 + k for k in range(batch)],
                    replace(options, window=window), grid=grid,
                )  # fmt: skip
                if run:
                    # one after the other, a step need not be a call of the model (`generation.drawing.engines`)
                    passes.append(counter.passes if window > 1 else grid[0] * grid[1])
                    seconds.append(time.perf_counter() - started)
                    codes.append(found.cpu())
            median, drawn = statistics.median(seconds), torch.stack(codes)
            first_median, first_codes = plain.setdefault(batch, (median, drawn))
            same = float((drawn == first_codes).double().mean())
            row = {"batch": batch, "window": window, "passes": statistics.mean(passes), "seconds": round(median, 3),
                   "gain": round(first_median / median, 2), "same": round(same, 4)}  # fmt: skip
            rows.append(row)
            print(f"{batch:5} {window:6} {row['passes']:7.1f} {median:8.3f} {row['gain']:6.2f} {same:6.3f}", flush=True)
    weight = model.embed.weight
    where = {**vars(arguments), "device": str(weight.device), "dtype": str(weight.dtype).removeprefix("torch.")}
    record: dict[str, object] = {**where, "rows": rows}
    for window in () if arguments.janus else (16, 32):
        record[f"speculative_{window}"] = speculative_passes(model, texts[0], options, grid, window)
        print(f"speculative rule, window {window}: {record[f'speculative_{window}']} passes")
    print(json.dumps(record))


JANUS = SamplingOptions(temperature=1.0, guidance=GUIDANCE)


@torch.no_grad()
def random_janus(width: int, layers: int, sharpness: float) -> Transformer:
    """Janus-1B's row, vocabulary of codes and head width, of another width and depth."""
    config = replace(shape("1b", layers), width=width, heads=max(1, width // 128), mlp_width=width * 11 // 4)
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for block in model.blocks:
        for name, weight in block.named_parameters():
            if name.endswith("weight") and weight.ndim == 2:
                weight.mul_(3.0)  # or every place would look the same
    model.code_head.project.weight.mul_(sharpness)
    return model


class CountPasses:
    """Counts the calls of a model."""

    def __init__(self, model: Transformer) -> None:
        self.passes = 0
        model.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.passes += 1


@torch.inference_mode()
def speculative_passes(
    model: Transformer, text: Sequence[int], options: SamplingOptions, grid: tuple[int, int], window: int
) -> int:
    """Passes for one picture by speculative Jacobi decoding, whole rows without a cache: slow, but simple to check."""
    config, steps = model.config, grid[0] * grid[1]
    device, generator = model.embed.weight.device, torch.Generator().manual_seed(0)
    rows = [training_row(config.vocabulary, ids, torch.zeros(grid), config.max_text, config.position_kind)
            for ids in (text, [])]  # fmt: skip
    draft = torch.randint(config.num_image_codes, (steps,), generator=generator)
    believed = torch.full((steps, config.num_image_codes), 1 / config.num_image_codes)  # what each draft was drawn from
    final = passes = 0
    while final < steps:
        end, logits = min(steps, final + window), []
        for row in rows:
            tokens = row.tokens.clone()
            places = row.image_mask.roll(1).nonzero()[:, 0]
            tokens[places] = draft[: len(places)]
            hidden = model(tokens[None].to(device), row.positions[None].to(device))[0, row.image_mask.to(device)]
            logits.append(model.logits(hidden[final:end], image_only=True).float().cpu())
        passes += 1
        masses = filter_logits(guide(torch.cat(logits), options.guidance), options).softmax(-1)
        place = final
        while place < end:
            mass, before, code = masses[place - final], believed[place], draft[place]
            place += 1
            if torch.rand((), generator=generator) * before[code] < mass[code]:
                continue
            rest = (mass - before).clamp_min(0)
            draft[place - 1] = torch.multinomial(rest, 1, generator=generator)[0]
            break
        for later in range(place, end):
            believed[later] = masses[later - final]
            draft[later] = torch.multinomial(believed[later], 1, generator=generator)[0]
        final = place
    return passes


if __name__ == "__main__":
    main()
