"""Reading what a run kept: folders of `torch.distributed.checkpoint`, and the single files of older versions.

A stored state is plain facts and tensors by name; a process reads of each tensor what it has itself (`Layout.pieces`).
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from data.records import parse_json
from vqvae.training.config import TrainingError
from vqvae.training.sharding import fill_pieces

FACTS = "run.json"
DCP = "torch.distributed.checkpoint."
# what the list of a folder's tensors is made of: a pickle, of which nothing else is let in
NAMES = {
    (f"{DCP}metadata", name)
    for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
                 "StorageMeta", "_MEM_FORMAT_ENCODING")
} | {(f"{DCP}filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"), ("torch", "Size")}  # fmt: skip
NAMES |= {("torch", str(kind).removeprefix("torch.")) for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
PATHS = {("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib._local", "PosixPath")}
# what an old file holds, and of which type; "random" was a single CPU state before it was a list of every process's
ENTRIES: dict[str, tuple[type, ...]] = {
    "progress": (dict,),
    "model": (dict,),
    "average": (dict, type(None)),
    "optimizers": (list,),
    "random": (list, Tensor),
}


class Stored(Protocol):
    """A state that was kept; `str()` names the place for messages."""

    facts: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    def read(self, targets: dict[str, Tensor]) -> None:
        """Fill the targets, which `Layout.pieces` made, with the tensors of the same names."""


class StoredFolder:
    """A folder that any number of processes wrote. Raises `TrainingError` for one that is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.facts = parse_json((folder / FACTS).read_bytes())
            metadata = _Reader(folder).read_metadata()
        except (OSError, ValueError, EOFError, pickle.UnpicklingError, AttributeError, TypeError, KeyError) as error:
            raise TrainingError(f"{self} is damaged; delete it to go on from an older one, or to start anew") from error
        self.shapes = {
            name: tuple(entry.size)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, targets: dict[str, Tensor]) -> None:
        """See `Stored`; each process reads for itself."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is not needed to read
                checkpoint.load(dict(targets), storage_reader=_Reader(self.folder), no_dist=True)
        except (CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
            raise TrainingError(f"{self} is damaged; delete it to go on from an older one, or to start anew") from error


class StoredFile:
    """`checkpoint.pt`, the one file of older versions. Raises `TrainingError` when it is damaged or none of ours.

    `orders`: of each optimizer of the run the names of its parameters, which the file knows by their place alone.
    """

    def __init__(self, path: Path, orders: list[list[str]], opponent_order: list[str]) -> None:
        self.path = path
        state = self._load()
        self._check(state)
        self.tensors: dict[str, Tensor] = {}
        for part in ("model", "average"):
            self.tensors |= {f"{part}/{name}": tensor for name, tensor in (state[part] or {}).items()}
        names = []
        if len(state["optimizers"]) == len(orders):
            for number, (kept, order) in enumerate(zip(state["optimizers"], orders, strict=True)):
                names.append(self._add_moments(f"optimizer.{number}/", kept, order))
        random, opponent = state["random"], state.get("opponent")
        for number, own in enumerate(random if isinstance(random, list) else [{"cpu": random}]):
            self.tensors |= {f"random/{number}/{name}": value for name, value in own.items() if value is not None}
        if isinstance(opponent, dict) and set(opponent) == {"model", "optimizer"}:
            self.tensors |= {f"opponent/model/{name}": tensor for name, tensor in opponent["model"].items()}
            self._add_moments("opponent/optimizer/", opponent["optimizer"], opponent_order)
        self.facts = {
            "progress": state["progress"],
            "origin": state.get("origin"),
            "average": state["average"] is not None,
            "optimizers": names if names else [[]] * len(state["optimizers"]),
            "one random state": isinstance(random, Tensor),
        }
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def __str__(self) -> str:
        return str(self.path)

    def read(self, targets: dict[str, Tensor]) -> None:
        """See `Stored`."""
        for name, target in targets.items():
            fill_pieces(target, self.tensors[name])

    def _load(self) -> dict[str, Any]:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler meets damage with almost any exception type
            raise TrainingError(f"{self} is damaged; delete it to start anew") from error
        if not isinstance(state, dict):
            raise TrainingError(f"{self} is no checkpoint of a training run; choose another out=")
        return state

    def _check(self, state: dict[str, Any]) -> None:
        lacking = [name for name, kinds in ENTRIES.items() if name not in state or not isinstance(state[name], kinds)]
        if not lacking and not (
            set(state["progress"]) == {"step", "seconds"}
            and all(type(value) in (int, float) and value >= 0 for value in state["progress"].values())
        ):
            lacking = ["progress"]
        if lacking:
            raise TrainingError(f"{self} is no checkpoint of a training run: it lacks {', '.join(lacking)}")

    def _add_moments(self, prefix: str, kept: Any, order: list[str]) -> list[str]:
        """Name the moments of an optimizer's state; returns the names, or none where they are of other parameters."""
        try:
            if sum(len(group["params"]) for group in kept["param_groups"]) != len(order):
                return []
            for place, fields in kept["state"].items():
                self.tensors |= {f"{prefix}{order[place]}/{name}": value for name, value in fields.items()}
        except (KeyError, TypeError, IndexError, AttributeError):
            return []
        return sorted(order)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("no list of tensors")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PATHS:
            return Path
        if (module, name) not in NAMES and (module, name.partition(".")[0]) not in NAMES:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)
