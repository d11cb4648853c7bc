"""Published checkpoints of other projects: read without running them, checked, streamed into a part of ours.

A PyTorch checkpoint is a zip file with a pickle and the bytes of its tensors. `vqvae.storage.archive` reads the members
and checks them, `vqvae.storage.unpickling` the pickle. `check_tensors` is what every imported tensor goes through.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.atomic import new_folder
from data.config import to_stored
from vqvae.storage.archive import Archive
from vqvae.storage.parts import ModelError
from vqvae.storage.unpickling import Damaged, ForbiddenName, Unpickler, Unusable, check_program

# the pickle of torch.serialization.MAGIC_NUMBER, a long of ten bytes
LEGACY_START = b"\x80\x02\x8a\x0a" + torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
SHOWN = 3  # names in one message
FINITE_BLOCK = 1 << 20  # numbers that are looked at together
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# safetensors' names
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}
# the beginnings of keys -> whose they are, and what to do with them
LAYOUTS = {
    "quantize_t.": "CogView's image tokenizer (import cogview --tokenizer)",
    "word_embeddings.": "CogView's transformer (import cogview --generator, which takes the folder)",
    "transformer.layers.": "CogView's transformer (import cogview --generator, which takes the folder)",
    "imgencoder": "BriVL (import brivl)",
    "textencoder": "BriVL (import brivl)",
    "text_model.model.": "Emu3 as transformers stores it (import emu3, which takes the folder)",
    "vqmodel.": "Emu3 as transformers stores it (import emu3, which takes the folder)",
    "model.text_model.": "Emu3 as transformers stores it (import emu3, which takes the folder)",
    "vision_model.": "towers of Hugging Face's transformers (import transformers, which takes the folder)",
    "text_model.": "towers of Hugging Face's transformers (import transformers, which takes the folder)",
    "vision_gen_": "JanusFlow, which draws without codes and is not read",
    "cls_embedding.": "LlamaGen's transformer (import llamagen)",
    "encoder.conv_blocks.": "the picture tokenizer of LlamaGen (import llamagen --tokenizer)",
    "gen_vision_model.": "Janus (import janus, which takes the folder)",
    "model.vqmodel.": "Janus as transformers stores it (import janus, which takes the folder)",
    "bert.": "Chinese-CLIP (import chinese-clip), or another model with BERT",
    "visual.": "CLIP or Chinese-CLIP (import open-clip, import chinese-clip)",
    "text.": "OpenCLIP (import open-clip)",
}
CONTAINERS = {
    "learnable": "BriVL (import brivl)",
    "module": "a DeepSpeed checkpoint such as CogView's (import cogview --generator, which takes the folder)",
    "state_dict": "a training checkpoint with its weights under 'state_dict', such as Chinese-CLIP's or OpenCLIP's",
}


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from: the published key, its published shape, and whether to transpose it."""

    key: str
    shape: tuple[int, ...]
    transpose: bool = False


@dataclass(frozen=True)
class Made:
    """One of our tensors that is made of published ones when it is written, so that one at a time is in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    def numel(self) -> int:
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary that `torch.save` wrote to `path`; its tensors are mapped from the file where its members are.

    What holds no plain numbers (sparse, quantised, meta tensors) is an `Unusable`. Raises `ModelError` for a file that
    is missing, truncated, damaged, no checkpoint, or holds more than tensors, containers and the names of
    `vqvae.storage.unpickling.IGNORED`; nothing in it has run then.
    """
    if not path.is_file():
        raise ModelError(f"no checkpoint at {path}")
    archive = Archive(path)
    if "byteorder" in archive and bytes(archive.read("byteorder")).strip() != b"little":
        raise ModelError(f"{path} is refused: its numbers are not stored with the lowest byte first")
    program = bytes(archive.read("data.pkl"))
    try:
        check_program(program)
        content = Unpickler(program, lambda key: archive.read(f"data/{key}")).load()
    except ModelError:
        raise
    except ForbiddenName as error:
        reason = f"it asks for {shown(str(error))}, which weights do not need"
        raise ModelError(f"{path} is refused: {reason}; nothing of it was run") from error
    except Exception as error:  # a garbled pickle raises whatever its bytes happen to mean
        reason = shown(str(error) if isinstance(error, Damaged) else f"{type(error).__name__}: {error}", 200)
        raise ModelError(f"{path} is damaged or no checkpoint of weights ({reason})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def read_legacy_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary in a file from before PyTorch 1.6, which is no zip file; read whole, and nothing in it is run.

    Raises `ModelError` for a file that is damaged or holds more than tensors and plain containers.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path} is refused: it holds more than weights; nothing of it was run") from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise ModelError(f"{path} is damaged or truncated, fetch it again ({shown(str(error), 120)})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def is_legacy_checkpoint(path: Path) -> bool:
    """Whether a file begins as `torch.save` began before PyTorch 1.6: a pickle of protocol 2 of its magic number."""
    with path.open("rb") as file:
        return file.read(len(LEGACY_START)) == LEGACY_START


def section(content: Mapping[Any, Any], name: str, path: Path) -> dict[Any, Any]:
    """The dictionary of weights under a key. Raises `ModelError` that says what is there instead."""
    found = content.get(name)
    if not isinstance(found, dict):
        keys = _listed([shown(str(key)) for key in content], "keys")
        raise ModelError(
            f"{path} has no weights under the key {name!r}, but {keys}; it looks like {layout_of(content)}"
        )
    return found


def check_tensors(
    found: Mapping[Any, Any], shapes: Mapping[str, tuple[int, ...]], path: Path, *, whole: Collection[str] = ()
) -> None:
    """Check the name, kind, shape, layout and numbers of every tensor that is imported.

    Those in `whole` hold whole numbers, all others floating-point ones. Raises `ModelError` that says how many are
    missing, unexpected or wrong, and names the first three of each kind.
    """
    tensors = {key: found[key] for key in sorted(shapes) if key in found}
    problems = {
        "missing": sorted(shapes.keys() - found.keys()),
        "unexpected": sorted(shown(str(key)) for key in found.keys() - shapes.keys()),
        "not a tensor": [key for key, value in tensors.items() if not isinstance(value, Tensor | Unusable)],
    }
    for key, value in tensors.items():
        if isinstance(value, Tensor | Unusable) and (wrong := _wrong_kind(value, key in whole)):
            problems.setdefault(wrong, []).append(key)
    problems["of another shape"] = [
        f"{key} {shown(str(list(value.shape)))} instead of {list(shapes[key])}"
        for key, value in tensors.items()
        if isinstance(value, Tensor) and tuple(value.shape) != shapes[key]
    ]
    if not any(problems.values()):
        types = {tensor.dtype for tensor in tensors.values()}
        if {torch.float16, torch.bfloat16} <= types:  # the same bytes read as the other type are other numbers
            problems["of the types float16 and bfloat16 in one file"] = [*tensors]
        problems["with the same numbers in memory as another"] = _overlapping(tensors)
        problems["with NaN or infinite numbers"] = [key for key, value in tensors.items() if not _finite(value)]
    parts = [f"{problem}: {_listed(names)}" for problem, names in problems.items() if names]
    if parts:
        stranger = len(problems["missing"]) > max(SHOWN, len(shapes) // 2)
        hint = f"; it looks like {layout_of(found)}" if stranger else ""
        raise ModelError(f"{path} does not fit: {'; '.join(parts)}{hint}")


def shape_of(found: Mapping[Any, Any], key: str, dimensions: int, path: Path, owner: str) -> tuple[int, ...]:
    """The shape of the tensor that sizes are read from. Raises `ModelError` that says that the file is not `owner`."""
    value = found.get(key)
    if isinstance(value, Unusable):
        raise ModelError(f"{path} does not fit: {value.kind} instead of plain: {key}")
    if not isinstance(value, Tensor) or value.ndim != dimensions:
        raise ModelError(
            f"{path} is no {owner}: it has no {key} of {dimensions} dimensions under its {len(found)} keys, and looks "
            f"like {layout_of(found)}"
        )
    return tuple(value.shape)


def common_dtype(tensors: Mapping[str, Tensor], path: Path) -> torch.dtype:
    """The floating type of all tensors. Raises `ModelError` for several, or one that our files do not hold."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= DTYPES.keys():
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ModelError(f"{path} does not fit: tensors of {names} instead of one floating type")
    return dtypes.pop()


def layout_of(found: Mapping[Any, Any]) -> str:
    """Whose layout the keys look like, in words that follow "it looks like"."""
    keys = [str(key).removeprefix("module.") for key in found if isinstance(key, str)]
    for name, owner in CONTAINERS.items():
        if isinstance(found.get(name), dict):
            return owner
    for start, owner in LAYOUTS.items():
        if any(key.startswith(start) for key in keys):
            return owner
    return "no layout that is known here"


def shown(text: str, most: int = 100) -> str:
    """A name from a foreign file on one line, cut to `most` characters."""
    text = text[: most + 1]
    text = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= most else f"{text[:most]}..."


def converted(found: Mapping[str, Any], expected: Mapping[str, Source], path: Path) -> dict[str, Tensor]:
    """Our names with their tensors, checked: views of the mapped file, all of one floating type."""
    shapes = {source.key: source.shape for source in expected.values()}
    check_tensors(found, shapes, path)
    common_dtype({key: found[key] for key in shapes}, path)
    return {name: found[source.key].T if source.transpose else found[source.key] for name, source in expected.items()}


def stream_part(folder: Path, config: Any, tensors: Mapping[str, Tensor | Made]) -> str:
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
                source = tensors[name]
                tensor = source.make() if isinstance(source, Made) else source
                assert tensor.shape == source.shape
                assert tensor.dtype == source.dtype
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                # without a copy where the tensor is contiguous
                stored = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
                digest.update(stored)
                file.write(stored)
        text = json.dumps(to_stored(config), indent=2, sort_keys=True)
        (building / "config.json").write_text(text, encoding="utf-8")
    return digest.hexdigest()


def _listed(names: list[str], things: str = "tensors") -> str:
    if len(names) <= SHOWN:
        return ", ".join(names) or f"no {things}"
    return f"{len(names)} {things} ({', '.join(names[:SHOWN])}, ...)"


def _wrong_kind(value: Tensor | Unusable, whole: bool) -> str:
    """What is wrong with the kind of a tensor, or nothing."""
    if isinstance(value, Unusable):
        return f"{value.kind} instead of plain"
    if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
        return "sparse, quantised or without numbers"
    if value.dtype not in ((torch.int64,) if whole else FLOATS):
        return f"of the type {str(value.dtype).removeprefix('torch.')}"
    return "" if value.is_contiguous() else "with strides (store it with .contiguous())"


def _overlapping(tensors: Mapping[str, Tensor]) -> list[str]:
    """The tensors that share bytes with one before them: no published model ties what is imported."""
    places = sorted((tensor.data_ptr(), tensor.nbytes, key) for key, tensor in tensors.items() if tensor.numel())
    pairs = zip(places, places[1:], strict=False)
    return [later for (start, size, _), (place, _, later) in pairs if place < start + size]


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite in the type they are kept in, at most float32."""
    if not tensor.is_floating_point():
        return True
    blocks = tensor.reshape(-1).split(FINITE_BLOCK)
    narrow = tensor.dtype == torch.float64
    return all(bool(torch.isfinite(block.float() if narrow else block).all()) for block in blocks)
