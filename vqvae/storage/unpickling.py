"""Reads the pickle of a PyTorch checkpoint without running it: tensors and plain containers, and nothing else.

A pickle is a program that calls what it names. `Unpickler` gives it only the functions of this file
(docs.python.org/3/library/pickle.html, "Restricting Globals"). PyTorch's own `weights_only` reader does so too, but it
checks neither that a tensor's storage has the bytes that it declares nor their checksum, which `Archive` does.

`check_program` looks at the program before it is run: what could only cost memory or time (a memo of a billion entries,
a tuple of tuples as a key, which takes 2^n steps to hash) is refused there.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
MOST_BYTES = 1 << 22  # of the pickle; that of 2,000 tensors has 300 kB
OPCODES = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINSTRING SHORT_BINSTRING "
    "BINBYTES SHORT_BINBYTES BINUNICODE SHORT_BINUNICODE EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 "
    "TUPLE3 EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID BINPUT LONG_BINPUT MEMOIZE "
    "BINGET LONG_BINGET".split()
)
KEYS = frozenset(["str", "bytes", "bytes_or_str", "int", "int_or_bool", "bool", "long", "float", "None"])
FLOATS_AND_WHOLE = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
QUANTISED = ("QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage")
TORCH_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


# opcode -> how many values it takes below a mark or the end of the stack, whether all above a mark too; what it puts
EFFECTS = {
    opcode.name: (
        next(
            (place for place, kind in enumerate(opcode.stack_before) if kind.name == "mark"), len(opcode.stack_before)
        ),
        any(kind.name == "mark" for kind in opcode.stack_before),
        [kind.name for kind in opcode.stack_after],
    )
    for opcode in pickletools.opcodes
    if opcode.name in OPCODES
}


class ForbiddenName(Exception):
    """The pickle asks for a name that weights do not need; the message is the name."""


class Damaged(Exception):
    """The pickle contradicts itself or its storages; the message says where."""


@dataclass(frozen=True)
class Unusable:
    """Stands for a tensor that holds no plain array of numbers."""

    kind: str  # to precede "tensor"


class _Ignored:
    """Stands for anything of `IGNORED`: takes any arguments and any state, and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


@dataclass(frozen=True)
class _Storage:
    """The bytes of a member, and the type that their numbers have."""

    bytes: Tensor  # uint8 [n]
    dtype: torch.dtype


class Unpickler(pickle.Unpickler):
    """Runs a checked program; `read` gives the bytes of the storage of a key, checked."""

    def __init__(self, program: bytes, read: Callable[[str], memoryview]) -> None:
        super().__init__(io.BytesIO(program), encoding="utf-8")
        self._read = read
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        qualified = f"{module}.{name}"
        if qualified in IGNORED:
            return _Ignored
        if qualified in BUILDERS:
            return BUILDERS[qualified]
        if module in ("torch", "torch.storage") and name in (*FLOATS_AND_WHOLE, *QUANTISED):
            return name
        if module == "torch" and name in TORCH_DTYPES:
            return TORCH_DTYPES[name]
        if module == "torch" and name.startswith(("per_tensor_", "per_channel_")):  # kinds of quantisation
            return name
        if module in ("torch._utils", "torch._tensor") and name.startswith("_rebuild_"):
            words = name.removeprefix("_rebuild_").replace("_tensor", "").replace("qtensor", "quantised").split("_")
            return lambda *_: Unusable(" ".join(words))
        raise ForbiddenName(qualified)

    def persistent_load(self, identity: Any) -> Any:
        """("storage", type, key, device, number of elements): a storage of this file."""
        if not isinstance(identity, tuple) or len(identity) != 5:
            raise Damaged("a storage is not named as PyTorch names it")
        _, kind, key, _, count = identity
        if not isinstance(kind, str) or not isinstance(key, str) or type(count) is not int:
            raise Damaged("a storage is not named as PyTorch names it")
        if kind in QUANTISED:
            return Unusable("quantised")
        dtype = FLOATS_AND_WHOLE.get(kind)
        if dtype is None:
            raise Damaged("a storage has an unknown type")
        if key not in self._storages:
            content = self._read(key)
            empty = torch.zeros(0, dtype=torch.uint8)
            self._storages[key] = torch.frombuffer(content, dtype=torch.uint8) if len(content) else empty
        found = self._storages[key]
        if len(found) != count * dtype.itemsize:
            raise Damaged(
                f"storage {key[:20]!r} has {len(found)} bytes instead of the {count * dtype.itemsize} that it declares"
            )
        return _Storage(found, dtype)


def check_program(program: bytes) -> None:
    """Raise `Damaged` for a pickle that is not made as `torch.save` makes one. Nothing of it runs."""
    if len(program) > MOST_BYTES:
        raise Damaged(f"its pickle has {len(program)} bytes, and at most {MOST_BYTES} are read")
    stack = _Kinds()
    try:
        for opcode, argument, _ in pickletools.genops(program):
            stack.follow(opcode.name, argument, len(program))
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise Damaged(f"its pickle breaks off or is garbled ({str(error)[:80]})") from error


class _Kinds:
    """The kinds of the values that would lie on the stack and in the memo."""

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.marks: list[int] = []  # their places on the stack
        self.memo: dict[int, str] = {}

    def follow(self, name: str, argument: Any, size: int) -> None:
        """Do to the kinds what the opcode `name` would do to the values. Raises `Damaged`."""
        if name not in OPCODES:
            raise Damaged(f"its pickle uses {name}, which torch.save does not")
        if name == "MARK":
            self.marks.append(len(self.stack))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(self.memo) if name == "MEMOIZE" else argument
            if place > size:  # the memo is an array, as long as its largest place
                raise Damaged("its pickle remembers more than it holds")
            self.memo[place] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        else:
            count, marked, after = EFFECTS[name]
            start = (self.marks.pop() if marked else len(self.stack)) - count
            if start < (self.marks[-1] if self.marks else 0):
                raise Damaged("its pickle takes more than there is")
            # of SETITEM and SETITEMS: the dictionary, then keys and values in turn
            if name in ("SETITEM", "SETITEMS") and not KEYS.issuperset(self.stack[start + 1 :: 2]):
                raise Damaged("its pickle has a dictionary whose keys are no text and no numbers")
            self.stack[start:] = after


def _rebuild_tensor(
    storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor | Unusable:
    return _tensor(storage, offset, size, stride, None)


def _rebuild_tensor_v2(
    storage: Any, offset: int, size: Any, stride: Any, _grad: Any = None, _hooks: Any = None, metadata: Any = None
) -> Tensor | Unusable:
    if metadata:  # says that the numbers are stored negated or conjugated
        return Unusable("lazily negated or conjugated")
    return _tensor(storage, offset, size, stride, None)


def _rebuild_tensor_v3(
    storage: Any, offset: int, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> Tensor | Unusable:
    if metadata:
        return Unusable("lazily negated or conjugated")
    return _tensor(storage, offset, size, stride, dtype)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_from_type(build: Any, _type: Any, arguments: Any, _state: Any = None) -> Any:
    if build not in (_rebuild_tensor_v2, _rebuild_tensor_v3, _rebuild_parameter) or not isinstance(arguments, tuple):
        return Unusable("subclassed")
    return build(*arguments)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None) -> Tensor | Unusable:
    """A view of the storage. Raises `Damaged` for one that does not lie in it."""
    if isinstance(storage, Unusable):
        return storage
    numbers = [offset, *size, *stride]
    if not isinstance(storage, _Storage) or not all(type(number) is int and number >= 0 for number in numbers):
        raise Damaged("a tensor is not described as PyTorch describes it")
    if len(size) != len(stride) or len(size) > 64:
        raise Damaged(f"a tensor has {len(size)} sizes and {len(stride)} strides")
    dtype = dtype or storage.dtype
    end = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) + 1
    there, rest = divmod(len(storage.bytes), dtype.itemsize)
    if rest or (end > there and 0 not in size) or offset > there:
        shape = str(list(size))[:80]
        raise Damaged(f"a tensor {shape} does not lie in its storage of {len(storage.bytes)} bytes: it is too short")
    return storage.bytes.view(dtype).as_strided(size, stride, offset)


def _ordered_dict(*arguments: Any) -> OrderedDict[Any, Any]:
    if not arguments:
        return OrderedDict()
    pairs = arguments[0]
    if not isinstance(pairs, list) or not all(len(pair) == 2 and isinstance(pair[0], str | int) for pair in pairs):
        raise Damaged("a dictionary is not made of pairs")
    return OrderedDict(tuple(pair) for pair in pairs)


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    """The bytes that protocol 2 writes as a text."""
    if not isinstance(text, str) or encoding not in ("latin1", "utf-8"):
        raise Damaged("bytes are not stored as a text")
    return text.encode(encoding)


BUILDERS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _encode,
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": lambda *_: "device",
    "torch.serialization._get_layout": lambda *_: "layout",
    "torch.nn.parameter.Parameter": lambda *_: Unusable("subclassed"),
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
}
