"""A folder of published weights as hubs store them: one file, or shards with an index, safetensors or pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.records import parse_json
from vqvae.storage.parts import ModelError
from vqvae.storage.published import read_checkpoint, shown

WHOLE = ("model.safetensors", "pytorch_model.bin")
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_weights_folder(folder: Path) -> dict[str, Any]:
    """The tensors of a folder by their keys, mapped from its files; nothing in them is run.

    A whole file goes before shards, and safetensors before pickles. Raises `ModelError` for a folder without weights,
    a file or a shard that is missing, truncated, damaged or unsafe, and an index that says something else.
    """
    for whole, index in zip(WHOLE, INDEX, strict=True):
        if (folder / whole).is_file():
            return read_weights_file(folder / whole)
        if (folder / index).is_file():
            return _read_shards(folder / index)
    raise ModelError(f"{folder} has no weights: neither {WHOLE[0]} nor {WHOLE[1]} is there, nor an index of shards")


def read_weights_file(path: Path) -> dict[str, Any]:
    """The tensors of a .safetensors, else of what `torch.save` wrote. Raises `ModelError`."""
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        return read_checkpoint(path)
    if not path.is_file():
        raise ModelError(f"no checkpoint at {path}")
    try:
        return dict(load_file(path))
    except Exception as error:  # safetensors has its own kind, and raises KeyError for types that PyTorch lacks
        raise ModelError(f"{path} is truncated or damaged, fetch it again ({shown(str(error), 200)})") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ModelError` for one that is missing or holds anything else."""
    try:
        record = parse_json(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} is missing") from error
    except ValueError as error:
        raise ModelError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(record, dict):
        raise ModelError(f"{path} is damaged: it is not an object")
    return record


def _read_shards(index: Path) -> dict[str, Any]:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ModelError(f"{index} is damaged: it has no weight_map of keys to files")
    files = sorted(set(places.values()))
    for name in files:
        if Path(name).name != name:
            raise ModelError(f"{index} names the file {shown(name)!r}: shards must lie beside it")
        if not (index.parent / name).is_file():
            raise ModelError(f"{index.parent} is incomplete: the shard {shown(name)} of {len(files)} is missing")
    tensors: dict[str, Any] = {}
    for name in files:
        content = read_weights_file(index.parent / name)
        lost = sorted(key for key, file in places.items() if file == name and key not in content)
        if lost:
            raise ModelError(f"{index.parent / name} lacks {len(lost)} tensors of the index, such as {shown(lost[0])}")
        # what the index does not name is another shard's copy or a stranger: the check of all names sees the latter
        tensors |= {key: tensor for key, tensor in content.items() if places.get(key, name) == name}
    return tensors
