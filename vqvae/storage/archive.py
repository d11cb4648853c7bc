"""The zip file of a PyTorch checkpoint: its members are checked and mapped, or unpacked into memory.

PyTorch writes its members unpacked, and its reader, when it maps a file, takes the bytes of each as they stand. A file
that somebody zipped again has the same names, but packed bytes. Here each member is read as the zip file's directory
describes it, and its CRC-32 (PKWARE APPNOTE 6.3.10, section 4.4.7) is compared before anything uses it.
"""

from __future__ import annotations

import logging
import mmap
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from data.host_memory import free_host_bytes
from vqvae.storage.parts import ModelError

BLOCK = 1 << 20
MOST_MEMBERS = 100_000
ALIGNED = 16  # bytes of the largest number; PyTorch aligns its members to 64
MOST_EXPANSION = 1032  # DEFLATE makes at most 1032 bytes of one (zlib's technical details)
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
# the first bytes of a checkpoint of PyTorch 1.5 and older: a pickle of the magic number 0x1950a86a20f9469cfc6c
OLD_FORMAT = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """Where the bytes of a member lie in the file: packed with DEFLATE, or as they are."""

    name: str
    start: int
    stored: int  # bytes in the file
    size: int  # bytes unpacked
    crc: int
    packed: bool

    @property
    def copied(self) -> bool:
        """Whether the bytes must be read into memory: packed ones, and those of a tensor that are not aligned."""
        return self.packed or (self.start % ALIGNED != 0 and "data/" in self.name)


class Archive:
    """A checkpoint's zip file. Raises `ModelError` for a file that is none, damaged, or of another kind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            try:
                # private: what is changed in memory does not reach the file
                self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except ValueError as error:
                raise ModelError(f"{path} is truncated: it is empty; fetch it again") from error
            except OSError as error:
                raise ModelError(f"{path} cannot be mapped ({error})") from error
        self.members = self._read_directory()
        self.prefix = self._find_prefix()
        self._warn_if_copied()

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.members

    def read(self, name: str) -> memoryview:
        """The bytes of a member, writable: mapped, or unpacked into memory. Raises `ModelError` if its CRC is wrong."""
        member = self.members.get(self.prefix + name)
        if member is None:
            raise ModelError(f"{self.path} is damaged: its member {name} is missing")
        content = memoryview(self.mapped)[member.start : member.start + member.stored]
        if member.packed:
            content = self._unpack(member, content)
        if len(content) != member.size or _crc(content) != member.crc:
            raise ModelError(f"{self.path} is damaged: the bytes of its member {name} do not have their checksum")
        return memoryview(bytearray(content)) if member.copied and not member.packed else content

    def _read_directory(self) -> dict[str, Member]:
        try:
            if not zipfile.is_zipfile(self.path):
                raise ModelError(f"{self.path} {_what_it_is(self.mapped[:1024])}")
            with zipfile.ZipFile(self.path) as file:
                infos = file.infolist()
            if len(infos) > MOST_MEMBERS:
                raise ModelError(f"{self.path} is refused: {len(infos)} members, and at most {MOST_MEMBERS} are read")
            members = [self._member(info) for info in infos]
        except ModelError:
            raise
        except Exception as error:  # zipfile raises many unrelated kinds for wrong bytes
            raise ModelError(f"{self.path} is damaged: the directory of the zip file is wrong ({error})") from error
        by_name = {member.name: member for member in members}
        if len(by_name) < len(members):
            raise ModelError(f"{self.path} is damaged: two members of the zip file have the same name")
        end = 0
        for member in sorted(members, key=lambda member: (member.start, member.stored)):
            if member.start < end:
                raise ModelError(f"{self.path} is damaged: members of the zip file overlap")
            end = member.start + member.stored
        return by_name

    def _member(self, info: zipfile.ZipInfo) -> Member:
        name = info.filename.encode("ascii", "backslashreplace").decode()[:100]
        wrong = ModelError(f"{self.path} is damaged: its member {name} is not where the zip file's directory says")
        start = info.header_offset + LOCAL_HEADER.size
        if info.header_offset < 0 or start > len(self.mapped):
            raise wrong
        local = LOCAL_HEADER.unpack_from(self.mapped, info.header_offset)
        name_length, extra_length = local[-2:]
        named = self.mapped[start : start + name_length]
        start += name_length + extra_length
        if local[0] != b"PK\x03\x04" or named != info.orig_filename.encode(
            "utf-8" if info.flag_bits & 0x800 else "cp437"
        ):
            raise wrong
        if local[3] != info.compress_type or start + info.compress_size > len(self.mapped):
            raise wrong
        if info.flag_bits & 1:
            raise ModelError(f"{self.path} is refused: its member {name} is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ModelError(
                f"{self.path} is refused: its member {name} is packed by method {info.compress_type}, and only DEFLATE "
                "is read: unpack the file and zip its folder again with `zip -0 -r`"
            )
        packed = info.compress_type == zipfile.ZIP_DEFLATED
        possible = info.compress_size * MOST_EXPANSION + BLOCK if packed else info.compress_size
        if info.file_size > possible or (not packed and info.file_size != info.compress_size):
            raise ModelError(f"{self.path} is damaged: its member {name} cannot have {info.file_size} bytes")
        return Member(info.filename, start, info.compress_size, info.file_size, info.CRC, packed)

    def _find_prefix(self) -> str:
        """The folder of the members: PyTorch puts them all into one. Raises `ModelError` if there is no such folder."""
        found = [name for name in self.members if name.split("/")[1:] == ["data.pkl"] or name == "data.pkl"]
        if len(found) != 1:
            inner = [name for name in self.members if name.endswith((".pt", ".pth", ".bin", ".ckpt", ".safetensors"))]
            if inner and not found:
                raise ModelError(f"{self.path} is a zip file around {_short(inner[0])}: unpack it and import that")
            raise ModelError(f"{self.path} is a zip file, but no checkpoint of PyTorch: it has {len(found)} data.pkl")
        prefix = found[0].removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in self.members:
            raise ModelError(f"{self.path} is a TorchScript archive, a program: save its state_dict() with torch.save")
        return prefix

    def _warn_if_copied(self) -> None:
        copied = [member for member in self.members.values() if member.copied]
        size = sum(member.size for member in copied)
        free = free_host_bytes()
        if free is not None and size > free:
            raise ModelError(
                f"{self.path} was zipped again, and its {size / 1e9:.2f} GB do not fit into the {free / 1e9:.2f} GB of "
                "free memory: get the file as it was published, or import it where there is more"
            )
        if any(not member.name.endswith("data.pkl") for member in copied):
            logger.warning(
                "%s was zipped again: %d members that are packed or not aligned are read into memory, %.2f GB",
                self.path, len(copied), size / 1e9,
            )  # fmt: skip

    def _unpack(self, member: Member, content: memoryview) -> memoryview:
        try:
            unpacked = bytearray(member.size)
            unpacker, end = zlib.decompressobj(-zlib.MAX_WBITS), 0
            for start in range(0, len(content), BLOCK):
                # one byte more than there may be shows a member that is too long
                block = unpacker.decompress(content[start : start + BLOCK], member.size + 1 - end)
                if end + len(block) > member.size:
                    break
                unpacked[end : end + len(block)] = block
                end += len(block)
        except (zlib.error, MemoryError) as error:
            raise ModelError(f"{self.path} is damaged: its member {_short(member.name)} does not unpack") from error
        return memoryview(unpacked)[:end]


def _crc(content: memoryview) -> int:
    crc = 0
    for start in range(0, len(content), BLOCK):
        crc = zlib.crc32(content[start : start + BLOCK], crc)
    return crc


def _short(name: str) -> str:
    return name.encode("ascii", "backslashreplace").decode()[:100]


def _what_it_is(start: bytes) -> str:
    """What a file is that is no zip file, and what to do, to follow its name."""
    if start.startswith(b"PK\x03\x04"):  # a zip file's directory is its end
        return "is truncated: the end of the zip file is missing; fetch it again"
    if start[:1] == b"\x80" and OLD_FORMAT in start[:32]:
        return (
            "is in the format of PyTorch 1.5 and older, which has no checksums: load it with torch.load(path, "
            "weights_only=True), save what it returns with torch.save, and import that"
        )
    if start[:1] == b"\x80":
        return "is a bare pickle and no checkpoint that torch.save wrote; nothing of it was run"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000:
        return "is in the format of safetensors: give it a name that ends in .safetensors"
    if start.lstrip()[:1] == b"<" or start.startswith(b"version https://git-lfs"):
        return "is a page or a pointer, and not the weights: fetch the file itself"
    return "is no PyTorch checkpoint: its first bytes are not those of a zip file"
