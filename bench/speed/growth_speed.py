"""How time and memory of drawing grow with the codes of a picture, the pictures and the layers, in float32.

    python -m bench.speed.growth_speed [--full] [--device cpu]

Each point is a process of its own that draws once with random weights, 256 wide, 6 layers, 256 codes, 1 picture but for
what varies. `ms a code` is the mean of a step, early and late in the picture (its second and its last eighth):
attention reads all codes before, so late steps may take longer, but no more than in proportion to the codes. Memory is
the process's largest resident set, beside what it had before the model was made plus the plan of
`generation.drawing.memory.plan_drawing`.
--full goes to 4096 codes, 256 pictures and 24 layers. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SMALL = {"codes": [64, 256, 1024], "pictures": [1, 16, 32], "layers": [2, 6, 12]}
FULL = {"codes": [64, 256, 1024, 4096], "pictures": [1, 4, 16, 64, 256], "layers": [2, 6, 12, 24]}
BASE = {"codes": 256, "pictures": 1, "layers": 6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(draw(**json.loads(arguments.one))))
        return
    rows = []
    print("varies        at        s  ms a code: early    late  late / early  planned MB  peak MB  planned / peak")
    for name, values in (FULL if arguments.full else SMALL).items():
        for value in values:
            point = {**BASE, name: value, "device": arguments.device}
            command = [sys.executable, __file__, "--one", json.dumps(point)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row = {"varies": name, **point, **json.loads(done.stdout.splitlines()[-1])}
            rows.append(row)
            print(f"{name:9} {value:6} {row['s']:8.2f} {row['early_ms']:17.2f} {row['late_ms']:7.2f} "
                  f"{row['late_ms'] / row['early_ms']:13.2f} {row['planned_mb']:11.0f} {row['peak_mb']:8.0f} "
                  f"{row['planned_mb'] / row['peak_mb']:15.2f}", flush=True)  # fmt: skip
    print(json.dumps({"base": BASE, "width": 256, "rows": rows}))


def draw(codes: int, pictures: int, layers: int, device: str) -> dict[str, Any]:
    import torch

    from generation.drawing.decoding import generate_codes
    from generation.drawing.engines import Engine
    from generation.drawing.memory import plan_drawing
    from generation.drawing.sampling import SamplingOptions
    from generation.transformer.config import TransformerConfig
    from generation.transformer.model import Transformer
    from vqvae.model import VQVAEConfig

    on_gpu = device == "cuda"
    torch.ones(512, 512, device=device) @ torch.ones(512, 512, device=device)  # the libraries' own buffers
    before = torch.cuda.memory_allocated() if on_gpu else resident("VmRSS")
    side = round(codes**0.5)
    config = TransformerConfig.modern(width=256, depth=layers, heads=4, max_text=32, grid=(side, side))
    options = SamplingOptions(top_k=100)
    model = Transformer(config).eval().to(device)
    plan = plan_drawing(config, VQVAEConfig(), torch.float32, device, options=options)
    marks: list[float] = []

    def on_token(step: int, known: object) -> None:
        if on_gpu:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    engine = Engine("graph") if on_gpu else Engine()
    started = time.perf_counter()
    generate_codes(model, [[1]] * pictures, list(range(pictures)), options, grid=config.grid,
                   on_token=on_token, engine=engine)  # fmt: skip
    taken = time.perf_counter() - started
    eighth = codes // 8
    block = marks[:codes]  # the first block's steps
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
    return {
        "s": round(taken, 3),
        "early_ms": round(1000 * (block[2 * eighth - 1] - block[eighth - 1]) / eighth, 3),
        "late_ms": round(1000 * (block[-1] - block[-1 - eighth]) / eighth, 3),
        "planned_mb": round((before + plan.transformer + plan.working) / 1e6),
        "peak_mb": round(peak / 1e6),
    }


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
