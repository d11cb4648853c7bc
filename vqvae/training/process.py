"""The process that trains: its device, its place among the processes of torchrun, its seeds.

Processes form a mesh of four axes, data x shard x expert x tensor, in which the rank counts up along `tensor` first.
Those that differ along `tensor` alone see the same share of the batch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from data.config import ConfigError
from vqvae.training.config import LoopConfig, ParallelConfig, TrainingError

AXES = ("data", "shard", "expert", "tensor")
_mesh: DeviceMesh | None = None  # of the training that this process is in


def distributed() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process among all that train together; 0 writes logs, checkpoints and the trained part."""
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if distributed() else 1


def mesh() -> DeviceMesh | None:
    """The processes that train together, by `AXES`; None for one process alone."""
    return _mesh


def replicas() -> int:
    """How many shares a batch has."""
    return world_size() // (_mesh["tensor"].size() if _mesh is not None else 1)


def replica() -> int:
    """The number of this process's share of a batch."""
    return rank() // (_mesh["tensor"].size() if _mesh is not None else 1)


def print_once(text: str) -> None:
    """Print a line in the process of rank 0 alone."""
    if rank() == 0:
        print(text, flush=True)


class TrainingProcess:
    """A context in which a model is trained: seeds set, device chosen, torchrun's process group joined and left.

    The process group is destroyed on errors too. Under torchrun a process should enter once: a second group would find
    the addresses of the first in torchrun's store, and may wait for them until it times out. Raises `TrainingError` for
    a device that is not there, and `ConfigError` for a mesh that the processes do not make up, and for a batch that
    cannot be divided among them and micro-batches.
    """

    device: torch.device

    def __init__(self, config: LoopConfig, parallel: ParallelConfig | None = None) -> None:
        self.config, self.parallel = config, parallel or ParallelConfig()
        self._joined = False  # a process group that somebody else made is theirs to destroy

    def __enter__(self) -> TrainingProcess:
        global _mesh
        torch.manual_seed(self.config.seed)
        cuda = _wants_cuda(self.config.device)
        if "RANK" in os.environ and not distributed():
            dist.init_process_group("nccl" if cuda else "gloo")
            self._joined = True
        try:
            self.device = torch.device("cpu")
            if cuda:
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
                torch.cuda.set_device(self.device)
            sizes = mesh_sizes(self.parallel, world_size())
            if distributed():
                _mesh = init_device_mesh(self.device.type, sizes, mesh_dim_names=AXES)
            check_batch_size(self.config)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        global _mesh
        _mesh = None
        if self._joined and distributed():
            dist.destroy_process_group()
        self._joined = False


def mesh_sizes(parallel: ParallelConfig, processes: int) -> tuple[int, int, int, int]:
    """The sizes of `AXES`, `data` filled in. Raises `ConfigError` where their product cannot be `processes`."""
    inner = parallel.shard * parallel.expert * parallel.tensor
    data = parallel.data or max(1, processes // inner)
    if data * inner != processes:
        wanted = f"parallel.data={parallel.data or 'any number'} x shard={parallel.shard} x tensor={parallel.tensor}"
        if parallel.expert > 1:
            wanted += f" x expert={parallel.expert}"
        raise ConfigError(
            f"{wanted} is not the number of processes, {processes}: "
            f"start `torchrun --nproc-per-node {data * inner} -m mmwudao train ...`, or change one of them"
        )
    return data, parallel.shard, parallel.expert, parallel.tensor


def check_batch_size(config: LoopConfig) -> None:
    """Raises `ConfigError` unless processes and micro-batches can share out `config.batch_size` evenly."""
    parts = config.accumulate * replicas()
    if config.batch_size % parts:
        raise ConfigError(f"loop.batch_size={config.batch_size} is not a multiple of accumulate x processes = {parts}")


class Termination:
    """A context in which Ctrl-C and SIGTERM are noted in `asked`, not obeyed, so that the training can save first.

    A second one is obeyed at once. In a group of processes it is not, for torchrun sends on to each what a supervisor
    may have sent it already, and kills what has not left after 30 seconds. Signals that were ignored stay so, as those
    of a job in the background of a script; in threads beside the main one all are left alone.
    """

    asked = 0  # the number of the signal

    def __enter__(self) -> Termination:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: another language's, to be left there
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.asked = self.asked or number
        if distributed():
            return
        for other, handler in self._before.items():
            signal.signal(other, handler if other == signal.SIGINT else signal.SIG_DFL)
        if sys.stderr.isatty():  # not by print, which may be what the signal interrupts
            os.write(sys.stderr.fileno(), b"\nsaves after this step, then leaves; once more: leaves at once\n")


def _wants_cuda(choice: str) -> bool:
    if choice == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device=cuda, but PyTorch sees no CUDA device here")
    return choice == "cuda" or (choice == "auto" and torch.cuda.is_available())
