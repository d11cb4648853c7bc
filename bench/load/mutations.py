"""Ways to damage a checkpoint: its dictionary, its zip file, its pickle. Each returns what it did, in words.

`CONTENT` changes what `torch.save` gets, `FILE` the bytes of the file. A mutation of the pickle writes it with a right
checksum, as somebody would who means harm.
"""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

Weights = dict[Any, Any]

TYPES = (
    torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.complex128, torch.float8_e4m3fn,
)  # fmt: skip
ROUNDED = ("retyped to float16", "retyped to bfloat16")  # an importer may take these: the same numbers, rounded


# what torch.save gets


def retype(draw: random.Random, weights: Weights) -> str:
    key = draw.choice([*weights])
    kind = draw.choice(TYPES)
    weights[key] = weights[key].to(kind)
    return f"retyped to {str(kind).removeprefix('torch.')}"


def replace_kind(draw: random.Random, weights: Weights) -> str:
    key = draw.choice([key for key, value in weights.items() if value.ndim and value.is_floating_point()])
    value: Tensor = weights[key].float()
    kinds: dict[str, Callable[[], Any]] = {
        "sparse": value.to_sparse,
        "sparse rows": (value if value.ndim == 2 else torch.ones(2, 2)).to_sparse_csr,
        "quantised": lambda: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        "quantised by channel": lambda: torch.quantize_per_channel(
            value, torch.full((len(value),), 0.1), torch.zeros(len(value), dtype=torch.int64), 0, torch.quint8
        ),
        "meta": lambda: torch.empty(10**6, 10**6, device="meta"),
        "text": lambda: "weights",
        "nothing": lambda: None,
        "list": value.tolist,
        "array": value.numpy,
        "parameter": lambda: torch.nn.Parameter(value),
        "negated": lambda: torch.view_as_complex(torch.stack([value, value], -1)).conj().imag,
    }
    kind = draw.choice([*kinds])
    weights[key] = kinds[kind]()
    return f"became {kind}"


def reshape(draw: random.Random, weights: Weights) -> str:
    key = draw.choice([key for key, value in weights.items() if value.numel() > 1])
    value = weights[key]
    shapes = [[-1], [1, *value.shape], [*value.shape, 1], [*reversed(value.shape)], [0], [*value.shape[:-1], 0]]
    shape = draw.choice([shape for shape in shapes if shape != [*value.shape] and shape != [-1] * value.ndim])
    weights[key] = torch.empty(shape) if 0 in shape else value.reshape(shape)
    return f"reshaped from {value.ndim} to {len(shape)} sizes"


def poison(draw: random.Random, weights: Weights) -> str:
    key = draw.choice([key for key, value in weights.items() if value.is_floating_point() and value.numel()])
    number = draw.choice([float("nan"), float("inf"), float("-inf")])
    weights[key] = weights[key].clone()
    weights[key].view(-1)[draw.randrange(weights[key].numel())] = number
    return f"one number is {number}"


def stride(draw: random.Random, weights: Weights) -> str:
    key = draw.choice([key for key, value in weights.items() if value.numel() > 1])
    value = weights[key]
    way = draw.choice(["one number for all", "the other way round", "with gaps", "from within a larger storage"])
    if way == "one number for all":
        weights[key] = value.reshape(-1)[:1].expand(value.numel()).as_strided(value.shape, [0] * value.ndim)
    elif way == "the other way round":
        steps = [*torch.empty([*reversed(value.shape)]).stride()][::-1]
        weights[key] = value.clone().as_strided(value.shape, steps)
    elif way == "with gaps":
        weights[key] = torch.stack([value, value + 1], -1)[..., 0]
    else:
        larger = torch.cat([torch.ones(7, dtype=value.dtype), value.reshape(-1)])
        weights[key] = larger.as_strided(value.shape, value.contiguous().stride(), 7)
    return f"strides: {way}"


def share(draw: random.Random, weights: Weights) -> str:
    first, second = draw.sample([*weights], 2)
    one, other = weights[first], weights[second]
    if one.dtype == other.dtype and one.numel() >= other.numel() > 0:
        weights[second] = one.reshape(-1)[: other.numel()].view(other.shape)
    else:
        weights[second] = one
    return "two tensors share a storage"


def drop(draw: random.Random, weights: Weights) -> str:
    for key in draw.sample([*weights], draw.choice([1, 1, 3, len(weights)])):
        del weights[key]
    return "tensors are missing"


def drop_layer(draw: random.Random, weights: Weights) -> str:
    layers = {part for key in weights for part in key.split(".") if part.isdigit()}
    if not layers:
        return drop(draw, weights)
    layer = max(layers, key=int) if draw.random() < 0.7 else draw.choice(sorted(layers))
    for key in [key for key in weights if layer in key.split(".")]:
        del weights[key]
    return "a layer is missing"


def rename(draw: random.Random, weights: Weights) -> str:
    key = draw.choice([*weights])
    value = weights.pop(key)
    names: list[Any] = [
        key.upper(), key + "\n", key.replace(".", "/"), f"{key}.{10**9}", "红" * 5000, "", "module.module." + key,
        10**4500, -1, 1.5, None, True, b"bytes",
    ]  # fmt: skip
    name = draw.choice(names)
    weights[name] = value
    return f"renamed to {str(type(name).__name__)}"


def add(draw: random.Random, weights: Weights) -> str:
    key = next((key for key in weights if "layers.0." in key or ".0." in key), next(iter(weights)))
    number = draw.choice([99999999, 10**12, 10**4400, 57])
    name = key.replace(".0.", f".{'9' * 4400 if number == 10**4400 else number}.", 1)
    weights[name if name != key else f"{key}.{len(weights)}"] = torch.zeros(1)
    return "a layer far beyond the last"


def declare(draw: random.Random, weights: Weights) -> str:
    key = draw.choice([*weights])
    shape = draw.choice([[10**6, 10**6], [10**9], [2**31, 4], [1] * 63])
    weights[key] = torch.zeros(1, dtype=weights[key].dtype).as_strided(shape, [0] * len(shape))
    return "a huge shape on one number"


CONTENT: tuple[Callable[[random.Random, Weights], str], ...] = (
    retype, replace_kind, reshape, poison, stride, share, drop, drop_layer, rename, add, declare,
)  # fmt: skip


# the file


def flip(draw: random.Random, data: bytes) -> tuple[bytes, str]:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 4, 64])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed), "bits are flipped"


def cut(draw: random.Random, data: bytes) -> tuple[bytes, str]:
    return data[: draw.randrange(len(data))], "truncated"


def splice(draw: random.Random, data: bytes) -> tuple[bytes, str]:
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.choice([1, 64, 4096]))
    way = draw.choice(["removed", "doubled", "zeroed", "appended", "put before"])
    noise = draw.randbytes(end - start)
    changed = {
        "removed": data[:start] + data[end:],
        "doubled": data[:end] + data[start:],
        "zeroed": data[:start] + bytes(end - start) + data[end:],
        "appended": data + noise,
        "put before": noise + data,
    }[way]
    return changed, f"a piece is {way}"


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def zipped(members: list[tuple[str, bytes]], kind: int = zipfile.ZIP_STORED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", kind) as file:
        for name, content in members:
            file.writestr(zipfile.ZipInfo(name), content, kind)
    return target.getvalue()


def zip_again(draw: random.Random, data: bytes) -> tuple[bytes, str]:
    members = [*members_of(data).items()]
    way = draw.choice(["deflate", "stored", "bzip2", "lzma", "shuffled", "nested", "renamed folder", "with __MACOSX"])
    kinds = {"deflate": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}
    if way == "shuffled":
        draw.shuffle(members)
    elif way == "nested":
        members = [("weights.pt", data)]
    elif way == "renamed folder":
        members = [("other/" + name.partition("/")[2], content) for name, content in members]
    elif way == "with __MACOSX":
        members = [("archive/", b""), *members, ("__MACOSX/archive/._data.pkl", b"\0\5\x16\7")]
        kinds[way] = zipfile.ZIP_DEFLATED
    return zipped(members, kinds.get(way, zipfile.ZIP_STORED)), f"zipped again: {way}"


def change_members(draw: random.Random, data: bytes) -> tuple[bytes, str]:
    members = [*members_of(data).items()]
    place = draw.choice([index for index, (name, _) in enumerate(members) if "/data" in name])
    name, content = members[place]
    way = draw.choice(["dropped", "renamed", "doubled", "shortened", "lengthened", "emptied", "big-endian"])
    if way == "dropped":
        del members[place]
    elif way == "renamed":
        members[place] = (name + "9", content)
    elif way == "doubled":
        members.append((name, bytes(len(content))))
    elif way == "big-endian":
        members = [(other, b"big" if other.endswith("byteorder") else value) for other, value in members]
    else:
        lengths = {"shortened": content[:-4], "lengthened": content + bytes(4), "emptied": b""}
        members[place] = (name, lengths[way])
    return zipped(members), f"a member is {way}"


def change_directory(draw: random.Random, data: bytes) -> tuple[bytes, str]:
    """Fields of a member in the zip file's directory: its flags, method, checksum, sizes, and where it lies."""
    places = [place for place in range(len(data)) if data.startswith(b"PK\1\2", place)]
    place = draw.choice(places)
    field, form = draw.choice([(8, "<H"), (10, "<H"), (16, "<I"), (20, "<I"), (24, "<I"), (28, "<H"), (42, "<I")])
    size = struct.calcsize(form)
    old = struct.unpack_from(form, data, place + field)[0]
    most = 2 ** (8 * size) - 1
    new = draw.choice([0, 1, 8, old + 1, old * 2, most, most // 2, draw.randrange(most)]) & most
    changed = bytearray(data)
    struct.pack_into(form, changed, place + field, new)
    return bytes(changed), "the directory of the zip file is wrong"


def change_pickle(draw: random.Random, data: bytes) -> tuple[bytes, str]:
    members = members_of(data)
    name = next(name for name in members if name.endswith("data.pkl"))
    way = draw.choice([*PROGRAMS, "bits", "bits", "number", "number", "storage"])
    program = members[name]
    if way == "bits":
        program, _ = flip(draw, program)
    elif way == "number":
        program = _other_number(draw, program)
    elif way == "storage":
        kinds = [b"FloatStorage", b"HalfStorage", b"BFloat16Storage", b"IntStorage", b"DoubleStorage", b"NoStorage"]
        program = program.replace(b"FloatStorage", draw.choice(kinds), 1)
    else:
        program = PROGRAMS[way]
    members[name] = program
    return zipped([*members.items()]), f"the pickle has other {way}" if way not in PROGRAMS else f"the pickle: {way}"


def _other_number(draw: random.Random, program: bytes) -> bytes:
    """A size, stride, offset or count of the pickle becomes another one."""
    import pickletools

    names = ("BININT", "BININT1", "BININT2")
    numbers = [(op.name, at) for op, _, at in pickletools.genops(program) if op.name in names and at is not None]
    kind, place = draw.choice(numbers)
    length = {"BININT1": 1, "BININT2": 2, "BININT": 4}[kind]
    number = draw.choice([0, 1, 2, 255, 65535, 2**31 - 1, -1, -(2**31), draw.randrange(2**16)])
    return program[:place] + b"J" + struct.pack("<i", number) + program[place + 1 + length :]


class _Program:
    """Pickled, this is a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _nested_keys() -> bytes:
    """{x: 0}, where x is a tuple of twice the tuple before it: hashing takes 2^60 steps."""
    body = b"\x80\x02})q\x00"
    for index in range(60):
        body += b"h" + bytes([index]) + b"h" + bytes([index]) + b"\x86q" + bytes([index + 1])
    return body + b"K\x00s."


PROGRAMS: dict[str, bytes] = {
    "a call of the system": pickle.dumps({"module": _Program(numpy.save, "/nonexistent", 1)}, 2),
    "an import of a shell": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
    "nested keys": _nested_keys(),
    "a far memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".",
    "long text": b"\x80\x02X\xff\xff\xff\x7fa.",
    "deep lists": b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 20_000 + b".",
    "itself": b"\x80\x02}q\x00X\x06\x00\x00\x00moduleh\x00s.",
    "nothing": b"",
    "a list": b"\x80\x02].",
    "an old protocol": b"(dp0\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "a hash of an object": b"\x80\x02}ccollections\nOrderedDict\n)RK\x00s.",
    "a storage of nothing": b"\x80\x02}X\x01\x00\x00\x00aNQs.",
}
FILE: tuple[Callable[[random.Random, bytes], tuple[bytes, str]], ...] = (
    flip, flip, cut, splice, zip_again, zip_again, change_members, change_members, change_directory, change_pickle,
    change_pickle,
)  # fmt: skip
