"""The process that trains: its device, its place among the processes of torchrun, its seeds."""

from __future__ import annotations

import os
from types import TracebackType

import torch
import torch.distributed as dist

from data.config import ConfigError
from vqvae.training.config import LoopConfig, TrainingError


def distributed() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process among all that train together; 0 writes logs, checkpoints and the trained part."""
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if distributed() else 1


def print_once(text: str) -> None:
    """Print a line in the process of rank 0 alone."""
    if rank() == 0:
        print(text, flush=True)


class TrainingProcess:
    """A context in which a model is trained: seeds set, device chosen, torchrun's process group joined and left.

    The process group is destroyed on errors too. Under torchrun a process should enter once: a second group would find
    the addresses of the first in torchrun's store, and may wait for them until it times out. Raises `TrainingError` for
    a device that is not there, and `ConfigError` for a batch that cannot be divided among processes and micro-batches.
    """

    device: torch.device

    def __init__(self, config: LoopConfig) -> None:
        self.config = config
        self._joined = False  # a process group that somebody else made is theirs to destroy

    def __enter__(self) -> TrainingProcess:
        torch.manual_seed(self.config.seed)
        cuda = _wants_cuda(self.config.device)
        if "RANK" in os.environ and not distributed():
            dist.init_process_group("nccl" if cuda else "gloo")
            self._joined = True
        try:
            check_batch_size(self.config)
            self.device = torch.device("cpu")
            if cuda:
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
                torch.cuda.set_device(self.device)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._joined and distributed():
            dist.destroy_process_group()
        self._joined = False


def check_batch_size(config: LoopConfig) -> None:
    """Raises `ConfigError` unless processes and micro-batches can share out `config.batch_size` evenly."""
    parts = config.accumulate * world_size()
    if config.batch_size % parts:
        raise ConfigError(f"loop.batch_size={config.batch_size} is not a multiple of accumulate x processes = {parts}")


def _wants_cuda(choice: str) -> bool:
    if choice == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device=cuda, but PyTorch sees no CUDA device here")
    return choice == "cuda" or (choice == "auto" and torch.cuda.is_available())
