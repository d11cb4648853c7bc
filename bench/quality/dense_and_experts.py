"""A generator with a plain MLP beside two with 8 experts, at equal active parameters and equal steps.

    python -m bench.quality.dense_and_experts mmwudao/configs/emoji-generator.yaml --out runs/experts --steps 300 \
        data.codes=codes/emoji data.text_model=shards/emoji/text.model 'data.tokenizer=""' model.width=128

The same configuration, seed and batches: `dense`; `switch`, one expert as wide as the MLP; `bias`, two of half the
width. Printed as JSON, a line each: parameters in all and for one token, bits a code of each held-out split, the load
of the busiest expert in the worst layer over its even share (mean of the last tenth of the run), the share of choices
that were dropped, and seconds of CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.config import load_config
from generation.training.config import GeneratorTrainConfig
from generation.training.train_generator import train
from generation.transformer.config import TransformerConfig
from generation.transformer.expert_memory import all_expert_bytes
from generation.transformer.experts import ExpertOptions
from generation.transformer.model import Transformer
from vqvae.storage.parts import load_part

COUNT = 8


def variants(model: TransformerConfig) -> dict[str, ExpertOptions]:
    """The experts of each run."""
    return {
        "dense": ExpertOptions(),
        "switch": ExpertOptions(COUNT, "switch"),
        "bias": ExpertOptions(COUNT, "bias", width=model.hidden_width // 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", action="append", help="this run alone, by name; may be repeated")
    parser.add_argument("overrides", nargs="*", help="NAME=VALUE of the configuration")
    arguments = parser.parse_intermixed_args()
    config = load_config(GeneratorTrainConfig, arguments.config, arguments.overrides)
    every = {"steps": arguments.steps, "eval_every": arguments.steps, "save_every": arguments.steps, "minutes": 0.0}
    for name, experts in variants(config.model).items():
        if arguments.only and name not in arguments.only:
            continue
        loop = replace(config.loop, out=str(arguments.out / name), log_every=max(1, arguments.steps // 30), **every)
        started = time.process_time()
        folder = train(replace(config, model=replace(config.model, experts=experts), loop=loop, sample_prompts=[]))
        seconds = time.process_time() - started
        print(json.dumps({"run": name, **sizes(folder), **figures(arguments.out / name), "cpu_seconds": seconds}))


def sizes(folder: Path) -> dict[str, int]:
    """Parameters of a trained generator, in all and those that one token uses."""
    model = load_part(Transformer, folder)
    weight = model.embed.weight
    total, experts = sum(one.numel() for one in model.parameters()), model.config.experts
    stacked = all_expert_bytes(model.config, weight.dtype) // weight.element_size()
    idle = stacked * (experts.count - experts.chosen) // experts.count if experts.used else 0
    return {"parameters": total, "active": total - idle}


def figures(run: Path) -> dict[str, Any]:
    """The last evaluation, and means over the last tenth of the run."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {name: value for line in lines for name, value in line.items() if name.endswith("image_bits")}
    last = [line for line in lines if "train/loss" in line][-3:]
    for name in ("load", "dropped", "balance"):
        some = [line[f"train/{name}"] for line in last if f"train/{name}" in line]
        if some:
            found[name] = sum(some) / len(some)
    return found


if __name__ == "__main__":
    main()
