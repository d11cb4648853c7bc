"""Where the time of one decoding step goes, by torch.profiler: calls and microseconds of each operation a step.

    python -m bench.speed.profile_step [--engines modules fused] [--rows 2] [--dtype float32] [--steps 100] [--top 12]

The model is `emoji`, half through a picture. The profiler itself costs some microseconds a call, so the sum is larger
than the `ms` beside it, which is the median without it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from generation.drawing.engines import Engine, make_cache, make_step
from generation.drawing.prompts import pad_prompts, prefill
from generation.transformer.model import Transformer
from mmwudao.pipeline import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["modules", "fused"])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--top", type=int, default=12)
    arguments = parser.parse_args()
    model = load("emoji", arguments.device, arguments.dtype).generator.eval()
    record = {name: measure(model, name, arguments) for name in arguments.engines}
    for name, result in record.items():
        print(f"{name}: {result['ms']:.3f} ms a step, {result['calls']:.0f} operations")
        for row in result["operations"][: arguments.top]:
            print(f"  {row['name']:28} {row['calls']:6.1f} calls {row['us']:8.1f} us")
    print(json.dumps({**vars(arguments), "results": record}))


@torch.inference_mode()
def measure(model: Transformer, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    config, device = model.config, model.embed.weight.device
    kind = Engine(name).resolved(model)  # type: ignore[arg-type]
    rows = [[1, 2, 3]] * arguments.rows
    prompts = pad_prompts(config, rows, config.grid).to(device)
    cache = make_cache(kind, model, prompts.hidden)
    prefill(model, prompts, cache)
    step = make_step(kind, model, prompts.code_positions, cache)
    codes = torch.zeros(arguments.rows, dtype=torch.int64, device=device)
    place = config.grid[0] * config.grid[1] // 2
    times = []

    def run() -> None:
        cache.used = prompts.slots + place
        started = time.perf_counter()
        step(codes, place)
        times.append(time.perf_counter() - started)

    for _ in range(arguments.steps):
        run()
    milliseconds = 1000 * statistics.median(times)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(arguments.steps):
            run()
    averages = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    operations = [
        {"name": event.key, "calls": event.count / arguments.steps, "us": event.self_cpu_time_total / arguments.steps}
        for event in averages
    ]
    return {"ms": milliseconds, "calls": sum(row["calls"] for row in operations), "operations": operations[:30]}


if __name__ == "__main__":
    main()
