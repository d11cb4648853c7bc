"""All speed measurements, one after the other, and their JSON lines in one file.

    python bench/run_all.py cpu [-o bench/results/DATE-NAME.json] [--only decode ...]
    python bench/run_all.py gpu -o ...

`make bench` runs the CPU's in under ten minutes on two cores, `make gpu-bench` the GPU's in under nine. A measurement
that fails or takes longer than its limit is reported and the others go on; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

BENCH = Path(__file__).parent
# name: seconds it may take, script and arguments
CPU = {
    "draw": (60, "draw_speed.py --runs 2"),
    "decode": (120, "decode_speed.py --runs 2"),
    "decode-float32": (100, "decode_speed.py --runs 2 --dtype float32 --contenders auto free llama gpt2"),
    "decode-guided": (100, "decode_speed.py --runs 2 --guidance 3 --contenders auto llama gpt2"),
    "decode-original": (120, "decode_speed.py --shape 12x512 --dtype float32 --batches 1 --runs 1 "
                            "--contenders auto free original --original-steps 16"),
    "window": (60, "window_speed.py --windows 1 16 --batches 1 --runs 2"),
    "growth": (90, "growth_speed.py"),
    "tokenize": (60, "tokenize_speed.py"),
    "embed": (60, "embed_speed.py"),
    "images": (60, "image_speed.py"),
    "train": (100, "train_speed.py"),
    "train-pictures": (60, "train_pictures_speed.py"),
    "collection": (90, "collection_speed.py --items 20000"),
}  # fmt: skip
LONG = {  # on a CPU, by name (--only) alone
    "growth-full": (900, "growth_speed.py --full"),
    "decode-original-bfloat16": (150, "decode_speed.py --shape 12x512 --batches 1 --runs 1 "
                                      "--contenders auto free original --original-steps 16"),
}  # fmt: skip
GPU = {
    "decode-4b": (60, "decode_speed.py --shape cogview-4b --device cuda --batches 1 --runs 1 --contenders graph"),
    "decode-4b-compile": (90, "decode_speed.py --shape cogview-4b --device cuda --batches 1 --runs 1 "
                              "--contenders compile"),
    "decode-4b-int8": (75, "decode_speed.py --shape cogview-4b --device cuda --batches 1 --runs 1 --contenders int8"),
    "decode-4b-peer": (60, "decode_speed.py --shape cogview-4b --device cuda --batches 1 --runs 1 "
                           "--contenders gpt2-static"),
    "decode-4b-64": (40, "decode_speed.py --shape cogview-4b --device cuda --batches 64 --runs 1 --contenders graph"),
    "decode-emoji": (40, "decode_speed.py --device cuda --batches 1 64 --runs 1 --contenders graph modules llama"),
    "window": (30, "window_speed.py --device cuda --windows 1 16 32 --batches 1 8 --runs 2"),
    "growth": (30, "growth_speed.py --device cuda"),
    "train-1b": (60, "train_speed.py --shape 1b --device cuda --minutes 0.5 "
                     "--variants plain compiled compiled+packed peer"),
    "train-4b": (50, "train_speed.py --shape 4b --device cuda --minutes 0.5 "
                     "--variants compiled+checkpointed peer+checkpointed"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", choices=["cpu", "gpu"])
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--only", nargs="+")
    arguments = parser.parse_args()
    known = CPU | LONG if arguments.where == "cpu" else GPU
    unknown = set(arguments.only or []) - set(known)
    if unknown:
        parser.error(f"no measurement named {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if arguments.where == "gpu" and not torch.cuda.is_available():
        print("no CUDA device on this machine: nothing was measured")
        return
    record: dict[str, Any] = {**machine(arguments.where), "results": {}, "failed": {}}
    if arguments.out and arguments.out.exists():  # measurements may be taken one by one
        record["results"] = json.loads(arguments.out.read_text(encoding="utf-8"))["results"]
    for name in arguments.only or (CPU if arguments.where == "cpu" else GPU):
        limit, command = known[name]
        print(f"== {name}: {shown(command)}", flush=True)
        started = time.perf_counter()
        outcome = measure(command, limit, arguments.where)
        kind = "failed" if isinstance(outcome, str) else "results"
        record[kind][name] = outcome
        print(f"   {outcome if kind == 'failed' else 'done'} ({time.perf_counter() - started:.0f} s)", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(bool(record["failed"]))


def measure(command: str, limit: int, where: str) -> dict[str, Any] | str:
    """What a script's last line holds, with its command; or what went wrong."""
    script, *options = command.split()
    module = f"bench.speed.{script.removesuffix('.py')}"  # a script alone would not find `bench`
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""} if where == "cpu" else None
    with subprocess.Popen(
        [sys.executable, "-m", module, *options], stdout=subprocess.PIPE, text=True, env=environment, cwd=BENCH.parent
    ) as process:
        try:
            out, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            print(out, end="")
            return f"took longer than {limit} s"
    lines = out.splitlines()
    print("\n".join(lines[:-1]), flush=True)
    if process.returncode:
        return f"ended with {process.returncode}"
    result = json.loads(lines[-1])
    return {"command": shown(command), "result": result}


def shown(command: str) -> str:
    """As a user types it."""
    script, _, options = command.partition(" ")
    return f"python -m bench.speed.{script.removesuffix('.py')} {options}".rstrip()


def machine(where: str) -> dict[str, Any]:
    """Where and when."""
    if where == "gpu":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = named[0] if named else platform.processor()
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
