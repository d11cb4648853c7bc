"""Where a run is kept while it goes on: what a checkpoint holds, and how it is written and read.

`Checkpointer` is all that the loop knows of storage, so that sharded checkpoints can take the place of one file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from vqvae.training.config import TrainingError
from vqvae.training.process import distributed, rank, world_size

State = dict[str, Any]
# what a checkpoint holds, and of which type; "random" was a single CPU state before it was a list of every process's
ENTRIES: dict[str, tuple[type, ...]] = {
    "progress": (dict,),
    "model": (dict,),
    "average": (dict, type(None)),
    "optimizers": (list,),
    "random": (list, Tensor),
}


class Checkpointer(Protocol):
    """Keeps the last state of a run. Every process calls each method; `str()` names the place for messages."""

    def exists(self) -> bool:
        """Whether there is a state to go on from."""

    def save(self, step: int, state: State) -> None:
        """Keep `state`, reached after `step` steps: whole or not at all. `state` is not changed."""

    def load(self) -> State:
        """The state that was kept last, its tensors on the CPU. Raises `TrainingError` when it cannot be read."""


class FileCheckpointer:
    """One file, `checkpoint.pt`, that rank 0 writes and replaces atomically, and every process reads."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoint.pt"

    def __str__(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        """Whether the file is there."""
        return self.path.is_file()

    def save(self, step: int, state: State) -> None:
        """Write the file beside the old one, then take its place. Raises `OSError` when there is no room."""
        if rank() != 0:
            return
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.path)

    def load(self) -> State:
        """Read the file; nothing in it is run. Raises `TrainingError` when it is damaged or no checkpoint of ours."""
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler meets damage with almost any exception type
            raise TrainingError(f"{self} is damaged; delete it to start anew") from error
        if not isinstance(state, dict):
            raise TrainingError(f"{self} is no checkpoint of a training run; choose another out=")
        return state


def check_entries(state: State, place: object) -> None:
    """Raises `TrainingError` naming what `state`, read from `place`, lacks to be a checkpoint of the loop."""
    lacking = [name for name, kinds in ENTRIES.items() if name not in state or not isinstance(state[name], kinds)]
    if not lacking and set(state["progress"]) != {"step", "seconds"}:
        lacking = ["progress"]
    if lacking:
        raise TrainingError(f"{place} is no checkpoint of a training run: it lacks {', '.join(lacking)}")


def gather_random_states(device: torch.device) -> list[dict[str, Tensor | None]]:
    """The states of the random numbers, on the CPU and on `device`, of every process in the order of ranks.

    Every process must call this.
    """
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    own = {"cpu": torch.get_rng_state(), "cuda": cuda}
    if not distributed():
        return [own]
    states: list[Any] = [None] * world_size()
    dist.all_gather_object(states, own)
    return states


def restore_random_state(states: list[dict[str, Tensor | None]] | Tensor, device: torch.device) -> None:
    """Set the random numbers of this process to its own state in what `gather_random_states` gave.

    A process beyond those of the checkpoint keeps the state it has. An old checkpoint holds one CPU state, that of
    rank 0, which every process takes. Raises `RuntimeError`, `TypeError` or `KeyError` for what is no such state.
    """
    if isinstance(states, Tensor):
        torch.set_rng_state(states)
        return
    if rank() >= len(states):
        return
    own = states[rank()]
    cpu, cuda = own["cpu"], own["cuda"]
    if cpu is None:
        raise TypeError("no state of the CPU's random numbers")
    torch.set_rng_state(cpu)
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda, device)
