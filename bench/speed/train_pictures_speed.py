"""Pictures a second and model-FLOPs utilisation (MFU) of training the shipped tokenizer and towers, as configured.

    python -m bench.speed.train_pictures_speed [--parts tokenizer towers] [--shards data/samples/emoji] [--minutes 0.3]

Runs the training itself, but for evaluation and checkpoints. FLOPs are those that PyTorch counts in one step (products
and convolutions, forward and backward); the peak is that of `bench/speed/flops.py`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import retrieval.training.train_towers
import vqvae.train_tokenizer
import vqvae.training.loop
from bench.speed.flops import peak_flops
from data.config import load_config
from vqvae.training.loop import Loop

CONFIGS = Path(__file__).parents[2] / "mmwudao/configs"
PARTS: dict[str, tuple[Any, Any]] = {
    "tokenizer": (vqvae.train_tokenizer, vqvae.train_tokenizer.TokenizerTrainConfig),
    "towers": (retrieval.training.train_towers, retrieval.training.train_towers.RetrievalTrainConfig),
}
WARM_UP = 2  # steps


class MeasuredLoop(Loop):
    """The loop, for some seconds, with nothing but steps."""

    for_seconds = 10.0
    seconds: list[float]
    flops = 0

    def run(self, resume: bool = False) -> nn.Module:
        """Steps until `for_seconds` have passed; their times and FLOPs are left with the class."""
        for step in range(WARM_UP):
            self._step(step)
        with FlopCounterMode(display=False) as counter:
            self._step(WARM_UP)
        MeasuredLoop.flops, MeasuredLoop.seconds = counter.get_total_flops(), []
        while len(self.seconds) < 2 or sum(self.seconds) < self.for_seconds:
            started = time.perf_counter()
            self._step(WARM_UP + 1 + len(self.seconds))
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - started)
        return self.averaged


def measure(part: str, shards: Path, device: str, seconds: float, overrides: list[str]) -> dict[str, float | str]:
    """Train a part for `seconds`."""
    module, config_class = PARTS[part]
    MeasuredLoop.for_seconds = seconds
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"data.shards={shards}", f"loop.out={folder}", f"loop.device={device}", "data.exclude_families=[]"]
        if part == "towers":
            settings.append(f"text_model={shards / 'text.model'}")
        config = load_config(config_class, CONFIGS / f"emoji-{part}.yaml", [*settings, *overrides])
        with patch.object(vqvae.training.loop, "Loop", MeasuredLoop):
            module.train(config)
    took, steps = sum(MeasuredLoop.seconds), len(MeasuredLoop.seconds)
    peak, source = peak_flops(torch.device(device), getattr(torch, config.loop.precision))
    return {
        "part": part, "precision": config.loop.precision, "batch": config.loop.batch_size, "steps": steps,
        "pictures_per_s": round(steps * config.loop.batch_size / took, 2),
        "gflops_per_picture": round(MeasuredLoop.flops / config.loop.batch_size / 1e9, 3),
        "mfu": round(MeasuredLoop.flops * steps / took / peak, 4), "peak_tflops": round(peak / 1e12, 3),
        "peak_source": source,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--shards", type=Path, default=Path(__file__).parents[2] / "data/samples/emoji")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--minutes", type=float, default=0.3, help="of measuring, all parts together")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the configurations")
    arguments = parser.parse_args()
    record = []
    print(f"{'part':10} {'precision':9} {'batch':>5} {'steps':>5} {'pictures/s':>10} {'GFLOP each':>10} {'MFU':>6}")
    for part in arguments.parts:
        seconds = 60 * arguments.minutes / len(arguments.parts)
        row = measure(part, arguments.shards, arguments.device, seconds, arguments.set)
        record.append(row)
        print(
            f"{part:10} {row['precision']:9} {row['batch']:5} {row['steps']:5} {row['pictures_per_s']:10} "
            f"{row['gflops_per_picture']:10} {100 * float(row['mfu']):5.1f}%",
            flush=True,
        )
    print(
        json.dumps(
            {"parts": record, "device": arguments.device, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
        )
    )


if __name__ == "__main__":
    main()
