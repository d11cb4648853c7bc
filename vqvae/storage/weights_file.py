"""A safetensors file of which parts are read when they are needed, without mapping it or holding the rest."""

from __future__ import annotations

import math
import os
import struct
import threading
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from data.records import parse_json
from vqvae.storage.blocks import bits_of
from vqvae.storage.parts import ModelError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "U8": torch.uint8}
MOST_HEADER = 100_000_000  # bytes, as the format's own library has it
PIECE = 2**20  # bytes that are hashed at a time


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its `start` in the file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightsFile:
    """The tensors of a safetensors file by name. Raises `ModelError` for one that is damaged or stored in blocks.

    It is read, not mapped: a mapping counts whole against `ulimit -v`, and its pages against what a process may use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._file = path.open("rb", buffering=0)
            self.entries = self._read_header()
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise ModelError(f"{path} is missing, truncated or damaged ({error})") from error
        if any(bits_of(name) for name in self.entries):
            raise ModelError(f"{path} is stored in blocks of 8 bits, which are not read in parts: assemble it without")

    def _read_header(self) -> dict[str, StoredTensor]:
        (length,) = struct.unpack("<Q", self._file.read(8))
        if length > MOST_HEADER:
            raise ValueError("its header is too long")
        record = parse_json(self._file.read(length))
        record.pop("__metadata__", None)
        end = os.fstat(self._file.fileno()).st_size
        entries = {}
        for name, found in record.items():
            first, last = found["data_offsets"]
            entry = StoredTensor(DTYPES[found["dtype"]], tuple(int(n) for n in found["shape"]), 8 + length + int(first))
            if min((0, *entry.shape)) < 0 or entry.size != last - first or entry.start + entry.size > end or first < 0:
                raise ValueError(f"{name} does not lie in the file")
            entries[name] = entry
        return entries

    def read(self, name: str) -> Tensor:
        """A copy of a whole tensor."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(entry.start, tensor)
        return tensor

    def read_into(self, start: int, target: Tensor) -> None:
        """Fill a contiguous tensor with the bytes of the file from `start` on. Raises `ModelError`."""
        if target.numel() == 0:
            return
        view = target.detach().reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            if hasattr(os, "preadv"):
                count = os.preadv(self._file.fileno(), [view[done:]], start + done)
            else:  # no such call on this system: one reader at a time
                with self._lock:
                    self._file.seek(start + done)
                    count = self._file.readinto(view[done:]) or 0
            if not count:
                raise ModelError(f"{self.path} became shorter while it was read")
            done += count

    def content_hash(self) -> str:
        """The `vqvae.storage.parts.content_hash` of the part, a piece at a time."""
        digest = sha256()
        piece = torch.empty(PIECE, dtype=torch.uint8)
        for name, entry in sorted(self.entries.items()):
            digest.update(f"{name} {entry.dtype} {list(entry.shape)}\n".encode())
            for first in range(0, entry.size, PIECE):
                part = piece[: min(PIECE, entry.size - first)]
                self.read_into(entry.start + first, part)
                digest.update(part.numpy().data)
        return digest.hexdigest()
