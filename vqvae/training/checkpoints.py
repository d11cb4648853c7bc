"""Where a run is kept while it goes on: a folder for each checkpoint, which any number of processes writes and reads.

`Checkpointer` is all that the loop knows of storage. A checkpoint is built beside its place and renamed when it is
whole and on the disk; then the file `latest`, which names it, is replaced. A kill at any moment leaves the one before.
"""

from __future__ import annotations

import json
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from data.atomic import replace_synced, write_file
from vqvae.training.config import TrainingError
from vqvae.training.lease import Lease
from vqvae.training.process import distributed, rank
from vqvae.training.stored import FACTS, Stored, StoredFile, StoredFolder

OLD_FILE = "checkpoint.pt"  # of older versions
PLACES = ("global_shape", "global_offsets", "local_offsets", "local_sizes")


class Checkpointer(Protocol):
    """Keeps the last states of a run. Every process calls each method; `str()` names the place for messages."""

    def exists(self) -> bool:
        """Whether there is a state to go on from."""

    def claim(self) -> None:
        """Become the one group that writes here. Raises `TrainingError` where another one does."""

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Keep a state, reached after `step` steps: whole or not at all. What is given may change afterwards."""

    def check(self, wait: bool = False) -> None:
        """Raises what went wrong with the last `save` in the background, which `wait` waits for."""

    def load(self, orders: list[list[str]], opponent_order: list[str]) -> Stored:
        """The state that was kept last. Raises `TrainingError` when it cannot be read. For names see `StoredFile`."""

    def release(self) -> None:
        """Leave the place to others."""


def has_checkpoint(out: Path) -> bool:
    """Whether the folder of a run holds a state to go on from."""
    return (out / "checkpoints" / "latest").is_file() or (out / OLD_FILE).is_file()


class FolderCheckpointer:
    """Folders `checkpoints/STEP-LEASE` by `torch.distributed.checkpoint`, of which the last `keep` are kept.

    In the background, a copy in memory is written by a thread while training goes on.
    """

    def __init__(self, out: Path, keep: int = 1, background: bool = False) -> None:
        self.out, self.folder = out, out / "checkpoints"
        self.keep = keep
        self.lease = Lease(self.folder)
        # apart: training has the other
        self._group = cast(dist.ProcessGroup | None, dist.new_group(backend="gloo") if distributed() else None)
        self._writer = ThreadPoolExecutor(1) if background else None
        self._job: Future[None] | None = None

    def __str__(self) -> str:
        return str(self.folder)

    def exists(self) -> bool:
        """Whether a whole checkpoint is there."""
        return has_checkpoint(self.out)

    def claim(self) -> None:
        """See `Checkpointer`: the first process takes the lease, and removes what was never finished."""
        problem = [""]
        if rank() == 0:
            try:
                self.lease.claim()
                for unfinished in self.folder.glob("*.part"):
                    shutil.rmtree(unfinished, ignore_errors=True)
            except (TrainingError, OSError) as error:
                problem = [str(error)]
        numbers = [self.lease.number]
        if distributed():
            dist.broadcast_object_list(problem, group=self._group)
            dist.broadcast_object_list(numbers, group=self._group)
        if problem[0]:
            raise TrainingError(problem[0])
        self.lease.number = numbers[0]

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """See `Checkpointer`. Without room, raises `TrainingError`, here or at the next call."""
        self.check(wait=True)
        name = f"{step:08d}-{self.lease.number:06d}"
        if self._writer is None:
            self._write(name, tensors, facts)
        else:
            self._job = self._writer.submit(self._write, name, _copied(tensors), json.loads(json.dumps(facts)))

    def check(self, wait: bool = False) -> None:
        """See `Checkpointer`."""
        if self._job is not None and (wait or self._job.done()):
            job, self._job = self._job, None
            job.result()

    def load(self, orders: list[list[str]], opponent_order: list[str]) -> Stored:
        """See `Checkpointer`."""
        latest = self.folder / "latest"
        if not latest.is_file():
            return StoredFile(self.out / OLD_FILE, orders, opponent_order)
        name = latest.read_text(encoding="utf-8").strip()
        if not name or Path(name).name != name:
            raise TrainingError(f"{latest} is damaged: write the name of a folder beside it into it")
        return StoredFolder(self.folder / name)

    def release(self) -> None:
        """See `Checkpointer`; what is being written is finished first."""
        if self._writer is not None:
            self._writer.shutdown(wait=True)
        if rank() == 0:
            self.lease.release()

    def _write(self, name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        building = self.folder / f"{name}.part"
        try:
            if rank() == 0:
                self.lease.check()
                building.mkdir(parents=True, exist_ok=True)
                write_file(building / FACTS, json.dumps(facts).encode())
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                checkpoint.save(
                    dict(tensors), storage_writer=FileSystemWriter(building), process_group=self._group,
                    no_dist=self._group is None,
                )  # fmt: skip
            if rank() == 0:
                self.lease.check()
                replace_synced(building, self.folder / name)
                write_file(self.folder / "latest", f"{name}\n".encode())
                self._remove_old(name)
        except (CheckpointException, OSError, RuntimeError) as error:
            raise TrainingError(f"cannot write {building}: {_reason(error)}; the checkpoint before stays") from error
        finally:
            if rank() == 0:
                shutil.rmtree(building, ignore_errors=True)

    def _remove_old(self, last: str) -> None:
        whole = sorted(path for path in self.folder.iterdir() if (path / FACTS).is_file() and path.name <= last)
        for path in whole[: -self.keep]:
            shutil.rmtree(path, ignore_errors=True)
        (self.out / OLD_FILE).unlink(missing_ok=True)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the computer's memory, which say of which places of the whole they are as the originals do."""
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.detach().to("cpu", copy=True)
        for place in PLACES:
            if hasattr(tensor, place):
                setattr(found[name], place, getattr(tensor, place))
    return found


def _reason(error: BaseException) -> str:
    """One line of what went wrong in the first process that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"is the disk full? ({next(iter(str(error).splitlines()), '')})"
