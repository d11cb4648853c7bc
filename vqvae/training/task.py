"""What a training is of: the model, its data, its loss, its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from vqvae.training.sharding import CutPlan


class Batches(Protocol):
    """The data: micro-batches of one step. `step` and the loop's seed alone decide what is drawn."""

    def __call__(self, step: int) -> Iterator[tuple[Any, list[str]]]:
        """Yield `accumulate` pairs of (this process's part of a micro-batch, the ids of its samples)."""


@dataclass
class Opponent:
    """A second model that is trained in the same steps by an optimizer of its own, as a discriminator is.

    `loss_of(wrapped opponent)` is called after each micro-batch, of which the task's `loss_of` keeps what is needed;
    None leaves the opponent as it is. Its learning rate follows the schedule of the run.
    """

    model: nn.Module
    loss_of: Callable[[nn.Module], Tensor | None]
    learning_rate: float


@dataclass
class Task:
    """A model to train, and how.

    `loss_of(wrapped model, micro-batch)` gives a dict whose "loss" is minimised; the rest is logged.
    `evaluate(averaged model, step)` gives the figures of the held-out split; every process calls it.
    `save(averaged model, folder)` writes the trained part to the folder `part` of the run. An `opponent` is kept in
    checkpoints, but not in the part. `rates`: see `build_optimizers`.
    `origin` names what weights depend on and cannot be trained on without: the hashes of the tokenizers that made the
    data, say. A run goes on only with the same. `plans` cut the model for an axis of the mesh, tensor or expert, which
    is refused without one. `unshardable` says, in a line, why parallel.shard cannot train it.
    `after_step()` is called when the optimizers have made a step, for what learns without gradients.
    """

    model: nn.Module
    batches: Batches
    loss_of: Callable[[nn.Module, Any], dict[str, Tensor]]
    evaluate: Callable[[nn.Module, int], dict[str, float]]
    part: str
    save: Callable[[nn.Module, Path], object]
    opponent: Opponent | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    plans: dict[str, CutPlan] = field(default_factory=dict)
    unshardable: str = ""
    after_step: Callable[[], None] | None = None
