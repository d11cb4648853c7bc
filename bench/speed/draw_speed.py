"""Seconds and memory for 8 pictures of one prompt on the CPU: the whole command, and calls of a loaded pipeline.

    python -m bench.speed.draw_speed [--model emoji] [--runs 3]

The last line is JSON. Times are medians; memory is the peak of the whole process (resident set).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

PROMPT = "戴墨镜的笑脸"


def command_seconds(model: str) -> float:
    """Wall time of `mmwudao generate PROMPT -n 8` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "-m", "mmwudao", "generate", PROMPT, "-n", "8", "--seed", "0", "--model", model]
        subprocess.run([*command, "--device", "cpu", "-o", folder], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    # before this process imports torch: its children's peak would be hidden behind its own
    commands = [command_seconds(arguments.model) for _ in range(arguments.runs)]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # KiB on Linux

    import torch

    from mmwudao.pipeline import load

    rows = []
    for dtype in ("float32", "bfloat16"):
        started = time.perf_counter()
        pipe = load(arguments.model, device="cpu", dtype=dtype)
        loading = time.perf_counter() - started
        for n in (1, 8):
            times = []
            for _ in range(arguments.runs):
                started = time.perf_counter()
                pipe.generate(PROMPT, n=n, seed=0)
                times.append(time.perf_counter() - started)
            rows.append({"dtype": dtype, "n": n, "load_s": round(loading, 2), "first_s": round(times[0], 2),
                         "median_s": round(statistics.median(times), 2)})  # fmt: skip
    print(f"{'dtype':10} {'n':>3} {'load':>8} {'first':>8} {'median':>8}  (seconds)")
    for row in rows:
        figures = "".join(f"{row[name]:9}" for name in ("load_s", "first_s", "median_s"))
        print(f"{row['dtype']:10} {row['n']:3}{figures}")
    command = round(statistics.median(commands), 2)
    print(f"whole command, 8 pictures: {command} s (first {commands[0]:.2f} s), peak memory {peak:.0f} MiB")
    record = {
        "command_s": command, "command_first_s": round(commands[0], 2), "peak_mib": round(peak), "calls": rows,
        "torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
    }  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    main()
