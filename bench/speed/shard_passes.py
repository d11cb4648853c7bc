"""What `embed_speed.py` and `tokenize_speed.py` share: passes over shards measured in turn, and their table.

Time and CPU seconds of each pass, of this process and of those that it waited for. Threads that wait for each other by
spinning count as busy, so passes side by side, of one thread each, say what the work itself costs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.batches import cores


@dataclass
class Measured:
    """Seconds of each run of each pass."""

    wall: dict[str, list[float]] = field(default_factory=dict)
    busy: dict[str, list[float]] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser, repeat: int) -> None:
    parser.add_argument("--shards", type=Path, default=Path("data/samples/emoji"))
    parser.add_argument("--split", default="train")
    parser.add_argument("--repeat", type=int, default=repeat, help="every shard so many times")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cpu")


def cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure_passes(passes: Mapping[str, Callable[[], object]], runs: int, after: Callable[[], object]) -> Measured:
    """Every pass in turn, `runs` times after one that imports what they need; `after` tidies up after each turn."""
    measured = Measured({name: [] for name in passes}, {name: [] for name in passes})
    for run in range(runs + 1):
        for name, work in passes.items():
            started, start = time.perf_counter(), cpu_seconds()
            work()
            if not run:
                continue
            measured.wall[name].append(time.perf_counter() - started)
            measured.busy[name].append(cpu_seconds() - start)
        after()
    return measured


def report(measured: Measured, pictures: int, size: int, command: str, apart: Mapping[str, float]) -> dict[str, object]:
    """Print the table, and return the record of it.

    `size` is that of the shards in bytes, `command` the pass that is compared with the bare ones, and `apart` the CPU
    seconds of its parts, measured in one thread.
    """
    wall = {name: statistics.median(times) for name, times in measured.wall.items()}
    busy = {name: statistics.median(times) for name, times in measured.busy.items()}
    print(f"{'':16}  pictures/s   CPU ms a picture   pictures a CPU-s   MB a CPU-s")
    for name in wall:
        rate = pictures / busy[name]
        print(
            f"{name:16} {pictures / wall[name]:11.1f} {1000 / rate:18.3f} {rate:18.1f} {size / busy[name] / 1e6:12.2f}"
        )
    least = busy["side by side"] / (busy["side by side"] + sum(apart.values()))
    return {
        "pictures": pictures,
        "per_s": {name: round(pictures / seconds, 1) for name, seconds in wall.items()},
        "cpu_ms": {name: round(1000 * seconds / pictures, 3) for name, seconds in busy.items()},
        "mb_per_cpu_s": {name: round(size / seconds / 1e6, 2) for name, seconds in busy.items()},
        "apart_cpu_ms": {name: round(1000 * seconds / pictures, 3) for name, seconds in apart.items()},
        "ratio": round(wall["bare"] / wall[command], 3),
        "share_cpu": round(busy["side by side"] / busy[command], 3),
        "limit_side_by_side": round(least, 3),
        "threads": torch.get_num_threads(),
        "cores": cores(),
        "load": round(os.getloadavg()[0], 1),
    }


def print_record(record: dict[str, object], arguments: argparse.Namespace) -> None:
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    print(json.dumps(options | record))


def fail(reason: str, name: str, error: Exception) -> None:
    raise error
