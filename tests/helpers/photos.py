"""Folders of small pictures as people have them, and a RAW file with an embedded preview."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

from PIL import Image

from tests.helpers.colour_towers import COLOURS


def save_colour(path: Path, name: str, size: tuple[int, int] = (24, 16), **options: Any) -> Path:
    """A picture of one colour, in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[name]).save(path, **options)
    return path


def colour_at(image: Image.Image, place: tuple[int, int]) -> tuple[int, ...]:
    """The bands of the pixel at (x, y) of a picture that has several."""
    colour = image.getpixel(place)
    assert isinstance(colour, tuple)
    return colour


def exif_bytes(orientation: int = 1, taken: str | None = None) -> bytes:
    """EXIF data of a picture that is stored turned, or tells when it was taken (EXIF's form of a time)."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    if taken is not None:
        exif.get_ifd(0x8769)[0x9003] = taken
    return exif.tobytes()


def dng(preview: Image.Image, orientation: int = 1) -> bytes:
    """A DNG file of 64 x 64 grey cells with `preview` as its embedded JPEG (Adobe DNG specification 1.4, chapter 4)."""
    buffer = io.BytesIO()
    preview.save(buffer, "JPEG", quality=95)
    jpeg, cells = buffer.getvalue(), struct.pack("<4096H", *[1000] * 4096)
    short, long, byte, text = 3, 4, 1, 2
    srational = 10

    def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
        return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")

    def number(tag: int, kind: int, value: int) -> bytes:
        return entry(tag, kind, 1, struct.pack("<H" if kind == short else "<I", value))

    def at(tag: int, kind: int, count: int, place: int) -> bytes:
        return entry(tag, kind, count, struct.pack("<I", place))

    model = b"Test Camera\0"
    matrix = struct.pack("<18i", *[part for k in range(9) for part in (int(k % 4 == 0), 1)])
    outer, inner = 18, 13  # entries of the two directories
    first = 8
    second = first + 2 + 12 * outer + 4
    data = second + 2 + 12 * inner + 4
    places = {}
    blob = b""
    for name, content in (("model", model), ("matrix", matrix), ("jpeg", jpeg), ("cells", cells)):
        blob += b"\0" * (len(blob) % 2)
        places[name] = data + len(blob)
        blob += content
    preview_tags = [
        number(254, long, 1), number(256, long, preview.width), number(257, long, preview.height),
        entry(258, short, 1, struct.pack("<H", 8)), number(259, short, 7), number(262, short, 6),
        at(271, text, len(model), places["model"]), at(272, text, len(model), places["model"]),
        number(273, long, places["jpeg"]), number(274, short, orientation), number(277, short, 3),
        number(278, long, preview.height), number(279, long, len(jpeg)), number(330, long, second),
        entry(50706, byte, 4, bytes([1, 4, 0, 0])), at(50708, text, len(model), places["model"]),
        at(50721, srational, 9, places["matrix"]), number(50778, short, 21),
    ]  # fmt: skip
    raw_tags = [
        number(254, long, 0), number(256, long, 64), number(257, long, 64), number(258, short, 16),
        number(259, short, 1), number(262, short, 32803), number(273, long, places["cells"]), number(277, short, 1),
        number(278, long, 64), number(279, long, len(cells)), entry(33421, short, 2, struct.pack("<HH", 2, 2)),
        entry(33422, byte, 4, bytes([0, 1, 1, 2])), number(50717, long, 65535),
    ]  # fmt: skip
    assert (len(preview_tags), len(raw_tags)) == (outer, inner)
    directories = b"".join(
        struct.pack("<H", len(tags)) + b"".join(tags) + b"\0\0\0\0" for tags in (preview_tags, raw_tags)
    )
    return b"II*\0" + struct.pack("<I", first) + directories + blob
