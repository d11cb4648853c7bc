"""How much inheritance shortens training: steps to equal recall, with and without a trained text encoder.

    python -m bench.quality.inherit_steps mmwudao/configs/emoji-towers.yaml --text parts/e5 --out runs/inherit \
        --steps 600 data.shards=shards/emoji text_model=shards/emoji/text.model

Both runs have the same configuration, seed and number of steps; one has `inherit.text`. Printed for each split and as
JSON: the recall of the plain run at its end, and the first evaluation at which the other reached it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.config import load_config
from retrieval.training.train_towers import RetrievalTrainConfig, train
from vqvae.training.config import LoopConfig

MEASURE = "text_recall@10"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--text", required=True, help="the folder of a text encoder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=50, help="steps between two evaluations")
    parser.add_argument("overrides", nargs="*", help="NAME=VALUE of the configuration")
    arguments = parser.parse_intermixed_args()
    curves = {}
    for name, inherited in (("plain", []), ("inherit", [f"inherit.text={arguments.text}"])):
        config = load_config(RetrievalTrainConfig, arguments.config, [*arguments.overrides, *inherited])
        loop = {"out": str(arguments.out / name), "steps": arguments.steps, "eval_every": arguments.every}
        config.loop = replace(config.loop, minutes=LoopConfig().minutes, **loop)
        train(config)
        curves[name] = curve(arguments.out / name / "log.jsonl")
    for split, plain in curves["plain"].items():
        last_step, last = plain[-1]
        reached = next((step for step, value in curves["inherit"][split] if value >= last), None)
        end = curves["inherit"][split][-1][1]
        print(json.dumps({"split": split, "steps": last_step, "plain": last, "inherit": end, "reached_at": reached}))


def curve(log: Path) -> dict[str, list[tuple[int, float]]]:
    """Split -> (step, recall) of each evaluation."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        record: dict[str, Any] = json.loads(line)
        for name, value in record.items():
            if name.startswith("test/") and name.endswith(f"/{MEASURE}"):
                found.setdefault(name.split("/")[1], []).append((record["step"], value))
    return found


if __name__ == "__main__":
    main()
