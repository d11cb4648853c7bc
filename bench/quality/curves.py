"""Plot a run's log.

    python -m bench.quality.curves runs/emoji-tokenizer docs/tokenizer-curves.webp test/psnr test/usage

One panel for each figure named, against minutes of training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run, which holds log.jsonl")
    parser.add_argument("out", type=Path)
    parser.add_argument("figures", nargs="+", help="names in the log; a+b draws both in one panel")
    arguments = parser.parse_args()
    log = [json.loads(line) for line in (arguments.run / "log.jsonl").read_text().splitlines()]
    panels = arguments.figures
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for name in panel.split("+"):
            points = [(record["seconds"] / 60, record[name]) for record in log if name in record]
            if not points:
                parser.error(f"the log has no {name}; it has {', '.join(sorted({k for r in log for k in r}))}")
            axis.plot(*zip(*points, strict=True), label=name)
        axis.set_xlabel("minutes")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=110)
    print(arguments.out)


if __name__ == "__main__":
    main()
