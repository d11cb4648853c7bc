"""One picture file to RGB pixels: what Pillow reads, HEIC by pillow-heif, the embedded preview of a RAW by rawpy."""

from __future__ import annotations

import io
import os
from datetime import datetime
from pathlib import Path

from PIL import ExifTags, Image, features

from data.images import FORMATS, CorruptImage, open_image
from data.photos.files import RAW_SUFFIXES
from data.sample import DataError

MAX_PHOTO_PIXELS = 2**27  # 134 megapixels: telephones make pictures of 108
HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
AVIF_BRANDS = frozenset({b"avif", b"avis"})
TAKEN_FORMAT = "%Y:%m:%d %H:%M:%S"  # of EXIF


class MissingReader(DataError):
    """A picture of a format whose library is not installed; the message names the extra that installs it."""


def open_photo(path: Path | str, least_side: int | None = None) -> Image.Image:
    """The picture file at `path`, as `open_image` returns it; `info["taken"]` is when it was taken, if EXIF says so.

    The content decides what a file is, whatever its suffix says; only RAW files are known by their suffix.
    Raises `DataError` (`CorruptImage`, `ImageTooLarge`, `MissingReader`), and `OSError` for a file that cannot be read.
    """
    return read_photo(Path(path).read_bytes(), os.path.splitext(path)[1], least_side)


def read_photo(content: bytes, suffix: str, least_side: int | None = None) -> Image.Image:
    """`open_photo` of the content of a file with this suffix."""
    if suffix.lower() in RAW_SUFFIXES:
        return _raw_preview(content, least_side)
    formats = tuple(FORMATS)
    brands = _brands(content)
    if brands & AVIF_BRANDS:
        if not features.check("avif"):
            raise MissingReader("AVIF pictures need Pillow 11.3 or newer: pip install 'mmwudao[photos]'")
        formats = ("AVIF",)
    elif brands & HEIF_BRANDS:
        try:
            from pillow_heif import register_heif_opener
        except ImportError as error:
            raise MissingReader("HEIC pictures need pillow_heif: pip install 'mmwudao[photos]'") from error
        register_heif_opener(thumbnails=False)
        formats = ("HEIF",)
    image = open_image(content, MAX_PHOTO_PIXELS, least_side=least_side, formats=formats)
    taken = _taken(content, formats)
    if taken is not None:
        image.info["taken"] = taken
    return image


def _brands(content: bytes) -> set[bytes]:
    """The brands of an ISO base media file (ISO/IEC 14496-12, section 4.3), none for any other file."""
    if content[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(content[:4], "big"), 256)
    return {content[8:12]} | {content[start : start + 4] for start in range(16, end, 4)}


def _raw_preview(content: bytes, least_side: int | None) -> Image.Image:
    """The largest preview that the camera has put into a RAW file, turned upright."""
    try:
        import rawpy
    except ImportError as error:
        raise MissingReader("RAW pictures need rawpy: pip install 'mmwudao[photos]'") from error
    try:
        with rawpy.imread(io.BytesIO(content)) as raw:
            preview, flip = raw.extract_thumb(), raw.sizes.flip
    except rawpy.LibRawError as error:
        raise CorruptImage(f"a RAW file without a readable preview ({_words(error)})") from error
    if not isinstance(preview.data, bytes):  # pixels [H, W, 3]; else a JPEG file
        return _upright(Image.fromarray(preview.data).convert("RGB"), flip)
    image = read_photo(preview.data, ".jpg", least_side)
    with Image.open(io.BytesIO(preview.data)) as header:
        turned = ExifTags.Base.Orientation in header.getexif()  # then it was turned when it was read
    return image if turned else _upright(image, flip)


def _upright(image: Image.Image, flip: int) -> Image.Image:
    """`flip` is LibRaw's: 3 is a half turn, 5 a quarter turn against the clock, 6 one with it."""
    turns = {3: Image.Transpose.ROTATE_180, 5: Image.Transpose.ROTATE_90, 6: Image.Transpose.ROTATE_270}
    return image.transpose(turns[flip]) if flip in turns else image


def _taken(content: bytes, formats: tuple[str, ...]) -> str | None:
    """When the picture was taken as ISO 8601, by EXIF, or None if it does not say so in a way that is understood."""
    with Image.open(io.BytesIO(content), formats=formats) as image:
        try:
            exif = image.getexif()
            written = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal)
            return datetime.strptime(str(written).strip("\0 "), TAKEN_FORMAT).isoformat() if written else None
        except Exception:  # damaged EXIF, with almost any exception type: the picture itself is whole
            return None


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
