"""The plots of docs/speed.md from a file of results.

    python -m bench.speed.plot_speed bench/results/DATE-NAME.json -o docs/speed.webp

Panels: milliseconds a code for each way of drawing, by batch; how a step's time grows within pictures of more codes;
seconds by pictures and layers; planned and measured memory. What a file does not hold is left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/speed.webp"))
    arguments = parser.parse_args()
    record = json.loads(arguments.results.read_text(encoding="utf-8"))
    results = {name: entry["result"] for name, entry in record["results"].items()}
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    contenders(axes[0, 0], [results[name] for name in ("decode", "decode-float32") if name in results])
    growth = results.get("growth-full", results.get("growth"))
    if growth is not None:
        steps(axes[0, 1], growth["rows"])
        totals(axes[1, 0], growth["rows"])
        memory(axes[1, 1], growth["rows"])
    figure.suptitle(f"{record['hardware']}, {record['cores']} cores, torch {record['torch']}, {record['date']}")
    figure.savefig(arguments.out, dpi=90)


def contenders(axes: Axes, records: list[dict[str, Any]]) -> None:
    bars = [
        (f"{row['contender']}, {record['dtype']}, batch {row['batch']}", row["ms_a_code"], row["contender"])
        for batch in (1, 8)
        for record in records
        for row in record["rows"]
        if row["batch"] == batch
    ]
    colours = ["tab:grey" if kind.startswith(("llama", "gpt2")) else "tab:blue" for _, _, kind in bars]
    axes.barh([label for label, _, _ in bars], [value for _, value, _ in bars], color=colours)
    axes.bar_label(axes.containers[0], fmt="%.1f", fontsize=7, padding=2)  # type: ignore[arg-type]
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set(title="emoji: milliseconds a code, ours in blue")


def steps(axes: Axes, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row["varies"] == "codes"]
    for name in ("early_ms", "late_ms"):
        axes.plot([row["codes"] for row in rows], [row[name] for row in rows], marker="o", label=name[:-3])
    axes.set(xscale="log", yscale="log", xlabel="codes of the picture", title="milliseconds a step, 6 layers x 256")
    axes.legend()


def totals(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for name in ("codes", "pictures", "layers"):
        some = [row for row in rows if row["varies"] == name]
        axes.plot([row[name] for row in some], [row["s"] for row in some], marker="o", label=name)
    axes.set(xscale="log", yscale="log", title="seconds by codes, pictures and layers")
    axes.legend()


def memory(axes: Axes, rows: list[dict[str, Any]]) -> None:
    labels = [f"{row[row['varies']]} {row['varies']}" for row in rows]
    axes.plot(labels, [row["planned_mb"] for row in rows], "_", markersize=14, label="planned")
    axes.plot(labels, [row["peak_mb"] for row in rows], "o", label="measured")
    axes.tick_params(axis="x", rotation=60, labelsize=7)
    axes.set(title="MB at the peak, PyTorch included", ylim=(0, None))
    axes.legend()


if __name__ == "__main__":
    main()
