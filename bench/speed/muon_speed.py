"""What Muon costs a training step on a CPU, in bfloat16 and in float32: milliseconds, and tokens a second.

    OMP_NUM_THREADS=1 python -m bench.speed.muon_speed [--rows 16] [--rounds 5]
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1 python -m bench.speed.muon_speed   # without AMX

The shipped generator's shape, packed rows, float32. Each figure is the least of the rounds, in seconds of this
process's CPU time over all its threads, which other work on the machine hardly changes; with one thread that is the
time of an idle core. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench.speed.train_speed import draw_rows, shape_config
from data.text import TextTokenizer
from generation.rows.row import pack
from generation.transformer.model import Transformer
from vqvae.training.config import LoopConfig
from vqvae.training.muon import bfloat16_is_slow
from vqvae.training.optimizers import build_optimizers

SHARDS = Path(__file__).parents[2] / "data/samples/emoji"


def least_seconds(work: Callable[[], object], rounds: int) -> float:
    """CPU seconds of `work`, once more than `rounds` times: the first sets things up."""
    found = []
    for _ in range(rounds + 1):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    text = TextTokenizer(SHARDS / "text.model")
    config = shape_config("emoji", 0, text)
    rows = list(islice(draw_rows(config, text, SHARDS, False, arguments.rows), arguments.rows))
    batch, tokens = pack(config.vocabulary, rows), sum(len(row.tokens) for row in rows)
    torch.manual_seed(0)
    model = Transformer(config)
    gradients = least_seconds(lambda: model.loss(batch)["loss"].backward(), arguments.rounds)
    steps = {}
    for name, changes in {
        "adamw": {"optimizer": "adamw"},
        "muon in bfloat16": {"optimizer": "muon", "muon_dtype": "bfloat16"},
        "muon in float32": {"optimizer": "muon", "muon_dtype": "float32"},
    }.items():
        optimizers = build_optimizers(model, LoopConfig(learning_rate=1e-5, **changes))  # type: ignore[arg-type]
        steps[name] = least_seconds(lambda: [one.step() for one in optimizers], arguments.rounds)  # noqa: B023
    record: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "tokens": tokens,
        "gradients_ms": round(1000 * gradients, 1),
        "step_ms": {name: round(1000 * seconds, 1) for name, seconds in steps.items()},
        "tokens_per_cpu_second": {name: round(tokens / (gradients + seconds)) for name, seconds in steps.items()},
        "auto": "float32" if bfloat16_is_slow() else "bfloat16",
    }
    print(f"{tokens} tokens: forward and backward {record['gradients_ms']} ms")
    for name in steps:
        print(f"{name:18} {record['step_ms'][name]:8} ms  {record['tokens_per_cpu_second'][name]:6} tokens/s")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
