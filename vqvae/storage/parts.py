"""Model parts on disk: `config.json` + `model.safetensors` in a folder, or a hub id, checked on loading."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from data.atomic import new_file, new_folder
from data.records import parse_json
from vqvae.storage.blocks import bits_of, packed_tensors, unpacked_tensors

T = TypeVar("T", bound=PyTorchModelHubMixin)

LARGE = 2**20  # numbers
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names; float32 else


class ModelError(ValueError):
    """A model folder is missing, incomplete, damaged or does not fit; the message is one line."""


def content_hash(module: nn.Module) -> str:
    """SHA-256 (hex) over the names, dtypes, shapes and bytes of a module's tensors, whatever file they came from."""
    return _hash(module.state_dict())


def stored_hash(folder: Path) -> str:
    """The `content_hash` of the part in a folder, without building it. Raises `ModelError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return _hash(load_file(folder / "model.safetensors"))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / 'model.safetensors'} is missing, truncated or damaged ({error})") from error


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_part(cls: type[T], source: str | os.PathLike[str]) -> T:
    """A part from a folder or a hub id, in eval mode, in the dtype it is stored in. Raises `ModelError`.

    The weights are the mapped file itself: no second copy is made, and pages are read when they are used. Those that
    are stored in blocks of 8 bits become copies in the dtype of the others.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(source), allow_patterns=["config.json", "model.safetensors"]))
        except Exception as error:  # the hub client raises many unrelated kinds; all mean the same to the user
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ModelError(f"{source} is neither a folder nor a model that can be fetched ({reason})") from error
    config = _read_config(folder)
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            # get_slice reads the header alone
            dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / 'model.safetensors'} is truncated or damaged ({error})") from error
    try:
        module = _empty_part(cls, config)
        tensors = load_file(folder / "model.safetensors")
        if any(bits_of(name) for name in tensors):
            shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
            tensors = unpacked_tensors(tensors, shapes)
        check_names(module, tensors, folder)
        module.load_state_dict(tensors, assign=True)
    except ModelError:
        raise
    except (TypeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())  # PyTorch puts each tensor that does not fit on a line of its own
        raise ModelError(f"{folder} does not hold a {cls.__name__}: {reason[:300]}") from error
    stored = [dtype for name, dtype in STORED_DTYPES.items() if name in dtypes]
    return module.to(stored[0] if stored else torch.float32).eval()


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Inside, what safetensors says of a full or read-only disk is an `OSError`, as from every other writer."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def save_part(module: nn.Module, folder: Path, dtype: torch.dtype = torch.bfloat16) -> str:
    """Save a copy of `module`, its floating tensors in `dtype`, atomically; returns the content hash of the copy."""
    import copy

    stored: Any = copy.deepcopy(module).to(device="cpu", dtype=dtype).eval()
    folder = Path(folder)
    with new_folder(folder, replace=True) as building:
        with disk_errors():
            stored.save_pretrained(building)
        (building / "README.md").unlink(missing_ok=True)  # the model card belongs to the whole model
    return content_hash(stored)


def pack_part(folder: Path) -> None:
    """Rewrite the weights of the part in `folder`, large tensors in blocks of 8 bits (`vqvae.storage.blocks`).

    What `load_part` then gives has another content hash. Raises `ModelError` for weights that are missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is missing, truncated or damaged ({error})") from error
    with new_file(path) as building, disk_errors():
        save_file(packed_tensors(tensors, 8), building)
    path.chmod(0o644)  # safetensors writes private files


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Modules made inside have parameters of the right shape but no storage; their buffers are ordinary ones.

    `torch.device("meta")` would empty the buffers too, of which those that are not saved must hold their numbers; and
    PyTorch imports its compiler, for seconds, to fill a tensor on that device at random.
    """

    # PyTorch declares that a hook returns None, but uses what it returns
    def empty(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(empty)
    try:
        with _NoFilling():
            yield
    finally:
        hook.remove()


class _NoFilling(TorchFunctionMode):
    """Leaves out the functions of `nn.init`, and the methods under them, on tensors without storage.

    What is large and left empty is a parameter to be, and gets no storage even until then: where memory is limited,
    all experts of a layer may be more than there is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            shape = args[0] if args and not isinstance(args[0], int) else args
            if math.prod(shape) >= LARGE:
                kwargs = {**kwargs, "device": "meta"}
        tensor = args[0] if args else kwargs.get("tensor")
        if isinstance(tensor, Tensor) and tensor.is_meta:
            if getattr(nn.init, func.__name__, None) is func or func.__name__ in ("normal_", "uniform_"):
                return tensor
        return func(*args, **kwargs)


def read_empty_part(cls: type[T], folder: Path) -> T:
    """The part in a folder without its weights. Raises `ModelError`."""
    config = _read_config(folder)
    try:
        module: T = _empty_part(cls, config)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{folder} does not hold a {cls.__name__}: {' '.join(str(error).split())[:300]}") from error
    return module


def _read_config(folder: Path) -> dict[str, Any]:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} is not complete: {name} is missing")
    try:
        config = parse_json((folder / "config.json").read_bytes())
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is damaged: it is not JSON") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'config.json'} is damaged: it is not an object")
    return config


def _empty_part(cls: Any, record: dict[str, Any]) -> Any:
    kind = get_type_hints(cls.__init__)["config"]
    known = {field.name for field in fields(kind)}
    config = kind(**{name: value for name, value in record.items() if name in known})
    with without_weights():
        return cls(config)


def check_names(module: nn.Module, tensors: Mapping[str, object], folder: Path) -> None:
    """Raises `ModelError` unless `tensors`, of the part in a folder, are those that `module` has."""
    stored, expected = set(tensors), set(module.state_dict())
    if stored != expected:
        missing, unexpected = sorted(expected - stored), sorted(stored - expected)
        raise ModelError(
            f"{folder} does not hold this {type(module).__name__}: missing {missing[:3] or 'nothing'}, "
            f"unexpected {unexpected[:3] or 'nothing'}"
        )
