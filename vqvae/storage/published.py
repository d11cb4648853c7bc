"""Published checkpoints of other projects: read without running them, checked, streamed into a part of ours.

A PyTorch checkpoint is a pickle, and a pickle is a program. `read_checkpoint` has it interpreted by PyTorch's
`weights_only` unpickler, which builds tensors and plain containers and refuses every other name. What a training
checkpoint holds besides (NumPy arrays, sets, loss scalers) is on the list `IGNORED` and becomes an empty stand-in:
none of its code is imported or called.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.atomic import new_folder
from vqvae.storage.parts import ModelError

# names that training checkpoints are known to hold beside their tensors
IGNORED = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    "numpy.ndarray",
    "numpy.dtype",
    "__builtin__.set",
    "builtins.set",
    "argparse.Namespace",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
)
SHOWN = 8  # names in one message
# safetensors' names
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}


class _Ignored:
    """Stands for anything of `IGNORED`: takes any arguments and any state, and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from: the published key, its published shape, and whether to transpose it."""

    key: str
    shape: tuple[int, ...]
    transpose: bool = False


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary that `torch.save` wrote to `path`, its tensors mapped from the file instead of read.

    Raises `ModelError` for a file that is missing, truncated, no checkpoint, or holds more than tensors, containers
    and the names of `IGNORED`; nothing in it has run then.
    """
    if not path.is_file():
        raise ModelError(f"no checkpoint at {path}")
    if not zipfile.is_zipfile(path):  # the index of a zip file is its end
        raise ModelError(f"{path} is truncated or no PyTorch checkpoint (of PyTorch 1.6 or later): fetch it again")
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in IGNORED]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {name[1]}" if name else "its pickle is not made of tensors and plain containers"
        raise ModelError(f"{path} is refused: {what}, which weights do not need; nothing of it was run") from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{path} is damaged or truncated, fetch it again ({reason[0][:120]})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def check_tensors(found: Mapping[str, Any], expected: Mapping[str, Source], path: Path) -> torch.dtype:
    """`ModelError` that names every missing, unexpected and mis-shaped tensor; else the one dtype of them all."""
    wanted = {source.key: source.shape for source in expected.values()}
    check_shapes(found, wanted, path)
    dtypes = {found[key].dtype for key in wanted}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float16, torch.bfloat16}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ModelError(f"{path} does not fit: tensors of {names} instead of one floating type")
    return dtypes.pop()


def check_shapes(found: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """`ModelError` that names every missing, unexpected and mis-shaped tensor."""
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(map(str, found.keys() - wanted.keys())),
        "not a tensor": sorted(key for key in wanted.keys() & found.keys() if not isinstance(found[key], Tensor)),
    }
    tensors = {key: found[key] for key in sorted(wanted) if isinstance(found.get(key), Tensor)}
    problems["of another shape"] = [
        f"{key} {list(tensor.shape)} instead of {list(wanted[key])}"
        for key, tensor in tensors.items()
        if tuple(tensor.shape) != wanted[key]
    ]
    parts = [f"{problem}: {_listed(names)}" for problem, names in problems.items() if names]
    if parts:
        raise ModelError(f"{path} does not fit: {'; '.join(parts)}")


def converted(found: Mapping[str, Any], expected: Mapping[str, Source]) -> dict[str, Tensor]:
    """Our names with their tensors: views of the mapped file, which has been checked."""
    return {name: found[source.key].T if source.transpose else found[source.key] for name, source in expected.items()}


def stream_part(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> str:
    """Write a part (`config.json`, `model.safetensors`) tensor by tensor; returns its content hash.

    `config` is the dataclass of the part. No more than one tensor is in memory beside what `tensors` holds. The hash is
    that of `vqvae.storage.parts.content_hash` for the loaded part. `folder` appears only when it is whole.
    """
    names = sorted(tensors)
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format asks for data aligned to 8 bytes
    digest = sha256()
    with new_folder(folder) as building:
        with open(building / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for name in names:
                tensor = tensors[name]
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                # without a copy where the tensor is contiguous
                stored = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
                digest.update(stored)
                file.write(stored)
        text = json.dumps(asdict(config), indent=2, sort_keys=True)
        (building / "config.json").write_text(text, encoding="utf-8")
    return digest.hexdigest()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
