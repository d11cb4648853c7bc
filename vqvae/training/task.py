"""What a training is of: the model, its data, its loss, its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


class Batches(Protocol):
    """The data: micro-batches of one step. `step` and the loop's seed alone decide what is drawn."""

    def __call__(self, step: int) -> Iterator[tuple[Any, list[str]]]:
        """Yield `accumulate` pairs of (this process's part of a micro-batch, the ids of its samples)."""


@dataclass
class Task:
    """A model to train, and how.

    `loss_of(wrapped model, micro-batch)` gives a dict whose "loss" is minimised; the rest is logged.
    `evaluate(averaged model, step)` gives the figures of the held-out split; every process calls it.
    `save(averaged model, folder)` writes the trained part to the folder `part` of the run.
    """

    model: nn.Module
    batches: Batches
    loss_of: Callable[[nn.Module, Any], dict[str, Tensor]]
    evaluate: Callable[[nn.Module, int], dict[str, float]]
    part: str
    save: Callable[[nn.Module, Path], object]
