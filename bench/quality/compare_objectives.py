"""The three objectives of the towers at equal wall time: a Markdown table of recall on a held-out split.

    python -m bench.quality.compare_objectives --minutes 1.5 --batch-sizes 64 16
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from data.config import load_config
from retrieval.training.train_towers import RetrievalTrainConfig, train

CONFIG = Path(__file__).parents[2] / "mmwudao" / "configs" / "emoji-towers.yaml"
OBJECTIVES = {
    "clip": ["objective.name=clip"],
    "siglip": ["objective.name=siglip", "objective.temperature=0.1"],  # as its authors start it
    "siglip, bias -4": ["objective.name=siglip", "objective.temperature=0.1", "objective.bias=-4.0"],
    "moco, queue 4096": ["objective.name=moco"],
    "moco, queue 4096, top-k 4": ["objective.name=moco", "objective.top_k=4"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.5, help="of training for each row")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--split", default="test-family")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    rows = []
    for batch_size in arguments.batch_sizes:
        for name, settings in OBJECTIVES.items():
            with tempfile.TemporaryDirectory() as folder:
                never = ["loop.eval_every=1000000", "loop.save_every=1000000", "loop.warmup=20"]
                run = [f"loop.out={folder}/run", f"loop.minutes={arguments.minutes}", f"loop.batch_size={batch_size}"]
                data = [f"data.test=[{arguments.split}]"]
                train(load_config(RetrievalTrainConfig, CONFIG, [*never, *run, *data, *settings, *arguments.overrides]))
                last = json.loads((Path(folder) / "run" / "log.jsonl").read_text().splitlines()[-1])
            found = [last[f"test/{arguments.split}/{figure}"] for figure in ("text_recall@10", "image_recall@10")]
            ranks = last[f"test/{arguments.split}/text_median_rank"]
            rows.append(f"| {name} | {batch_size} | {last['step']} | {found[0]:.3f} | {found[1]:.3f} | {ranks:.0f} |")
    print("| objective | batch | steps | text to image R@10 | image to text R@10 | median rank |")
    print("|---|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
