"""The memory plan against the measured peak of the process (resident set) on the CPU, Linux only.

    python bench/speed/memory_check.py [--model emoji] [--width 512 --depth 12]

Each model draws in a process of its own: one that is on disk, and one with random weights. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure(model: str, width: int, depth: int) -> dict[str, object]:
    """Draw a picture; without `model` with random weights, most of its codes given."""
    import torch

    from generation.drawing.decoding import generate_codes
    from generation.drawing.memory import plan_drawing
    from generation.drawing.sampling import SamplingOptions
    from generation.transformer.config import TransformerConfig
    from generation.transformer.model import Transformer
    from mmwudao.pipeline import load
    from vqvae.model import VQVAE, VQVAEConfig

    torch.ones(512, 512) @ torch.ones(512, 512)  # the libraries' own buffers
    if model:
        before = resident("VmRSS")
        pipe = load(model, device="cpu", dtype="float32")
        plan = pipe.memory
        pipe.generate("a red apple", n=1, seed=0, sampling={"guidance": 2.0})
    else:
        before = resident("VmRSS")
        config = TransformerConfig.modern(width=width, depth=depth, heads=width // 64, max_text=48, grid=(16, 16))
        generator, tokenizer = Transformer(config).eval(), VQVAE(VQVAEConfig()).eval()
        given = torch.zeros(1, 16, 16, dtype=torch.int64)
        given.flatten(1)[:, 250:] = -1
        generate_codes(generator, [[1]], [0], SamplingOptions(), given_codes=given)
        plan = plan_drawing(config, tokenizer.config, torch.float32, "cpu", given=250)
    peak = resident("VmHWM")
    return {
        "model": model or f"random, {width} wide, {depth} layers",
        "before_mb": round(before / 1e6),
        "planned_mb": round((before + plan.total) / 1e6),
        "peak_mb": round(peak / 1e6),
        "ratio": round((before + plan.total) / peak, 3),
        "ratio_above_before": round(plan.total / max(1, peak - before), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one, arguments.width, arguments.depth)))
        return
    rows = []
    for model in (arguments.model, ""):
        command = [sys.executable, __file__, "--one", model]
        command += ["--width", str(arguments.width), "--depth", str(arguments.depth)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
