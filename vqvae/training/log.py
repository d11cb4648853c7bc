"""The figures of a run: a line of JSON, TensorBoard, and a line on the terminal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Progress:
    """Where training stands: steps done, seconds spent so far, over all resumed parts of the run."""

    step: int = 0
    seconds: float = 0.0


class RunLog:
    """Writes figures to `log.jsonl` and `tensorboard/` in the folder of a run, and prints them."""

    def __init__(self, out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.file = out / "log.jsonl"
        self.writer = SummaryWriter(str(out / "tensorboard"))

    def write(self, progress: Progress, figures: Mapping[str, float]) -> None:
        """Append the figures of one moment."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, progress.step)
        record = {"step": progress.step, "seconds": round(progress.seconds, 1)}
        record.update({name: float(f"{value:.6g}") for name, value in figures.items()})
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print("  ".join(f"{name} {value:.5g}" for name, value in record.items()), flush=True)

    def close(self) -> None:
        """Finish TensorBoard's file."""
        self.writer.close()


class Means:
    """Means of figures over steps; a figure need not come up in every step."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: Counter[str] = Counter()

    def add(self, figures: Mapping[str, float]) -> None:
        """Take the figures of one step."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] += 1

    def take(self) -> dict[str, float]:
        """The mean of each figure since the last call."""
        means = {name: value / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, Counter()
        return means
