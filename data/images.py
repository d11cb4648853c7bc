"""Encoded pictures to RGB: whatever Pillow opens of the common formats, with one clear error for what it cannot."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from data.sample import DataError
from data.settings import MAX_PIXELS

if TYPE_CHECKING:
    import torch

# not all of Pillow's plug-ins: some start other programs (EPS) or are seldom exercised
FORMATS = {"PNG": "png", "WEBP": "webp", "JPEG": "jpg", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif"}
# Pillow warns from 89 megapixels on, in two lines, of what our lower cap refuses in one
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class CorruptImage(DataError):
    """The bytes are no picture of a known format, or it does not decode to its end."""


class ImageTooLarge(DataError):
    """The picture has more pixels than the cap."""


def open_image(
    source: bytes | Path | str,
    max_pixels: int = MAX_PIXELS,
    *,
    least_side: int | None = None,
    formats: Sequence[str] = tuple(FORMATS),
    alpha: bool = False,
) -> Image.Image:
    """Decode `source` (encoded bytes, or a path) to RGB, 8 bits a channel.

    Turned upright by its EXIF orientation, transparency laid on white, 16-bit grey scaled to 8 bits, the first frame
    of an animation. The cap `max_pixels` (width x height) is checked on the header, before decoding. `least_side`
    lets a JPEG be decoded at a half, a quarter or an eighth of its size, while both sides keep as many pixels.
    `formats` are Pillow's names of those that are tried. With `alpha`, transparency stays, as RGBA (see `to_rgba`).
    Raises `CorruptImage` or `ImageTooLarge` (both `DataError`).
    """
    try:
        with _opened(source, formats) as image:
            if image.width * image.height > max_pixels:
                raise ImageTooLarge(f"a picture of {image.width}x{image.height} pixels; the cap is {max_pixels} pixels")
            if least_side is not None:
                image.draft(None, (least_side, least_side))  # from fewer DCT coefficients; other formats ignore it
            return to_rgba(image) if alpha else to_rgb(image)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders meet damage with almost any exception type
        raise CorruptImage(f"a picture that does not decode ({_one_line(error)})") from error


def read_header(source: bytes | Path | str) -> tuple[int, int, str]:
    """Width and height in pixels as stored, and the usual file extension, without decoding.

    Raises `CorruptImage` or, beyond Pillow's own limit, `ImageTooLarge`.
    """
    with _opened(source) as image:
        return image.width, image.height, FORMATS.get(image.format or "", "jpg")  # MPO: JPEG with more frames


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened picture of any mode to what `open_image` returns; no copy is made where none is needed.

    Raises `CorruptImage` for floating-point pixels.
    """
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it would only be copied
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise CorruptImage("a picture of floating-point pixels; convert it to 8 bits a channel")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow alone would clip at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        pixels = (grey + 128) // 257
        if "transparency" in image.info:  # PNG's one transparent value, of the 16 bits
            pixels[grey == image.info["transparency"]] = 255
        return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    if _has_alpha(image):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "RGB" and type(image) is Image.Image:  # not one that belongs to an open file
        return image
    return image.convert("RGB")


def to_rgba(image: Image.Image) -> Image.Image:
    """As `to_rgb`, but a picture with transparency becomes RGBA, with its colours as they are stored."""
    image.load()
    if not _has_alpha(image) or image.mode.startswith("I"):
        return to_rgb(image)
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return image.convert("RGBA")


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info


def to_square(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` pixels and crop the centre: `size` x `size`."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def to_squares(images: Sequence[Image.Image], size: int) -> torch.Tensor:
    """`to_square` of RGB pictures as bytes [N, size, size, 3], where PyTorch can in a fraction of Pillow's time.

    Its filter is Pillow's, in whole numbers too: a value in a hundred differs, by 1 or 2 of 255. Pictures of one size
    are resized together.
    """
    import torch

    squares = torch.empty(len(images), size, size, 3, dtype=torch.uint8)
    places: dict[tuple[int, int], list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.size, []).append(place)
    for (width, height), same in places.items():
        side = min(width, height)
        if width == height == size:
            for place in same:
                squares.numpy()[place] = np.asarray(images[place])
            continue
        # Pillow takes an odd margin from between pixels
        if side == size or (width - height) % 2 or not _resizes_bytes():
            pictures = [np.asarray(to_square(images[place], size)) for place in same]
            squares[same] = torch.from_numpy(np.stack(pictures))
            continue
        left, top = (width - side) // 2, (height - side) // 2
        pixels = torch.from_numpy(np.stack([np.asarray(images[place]) for place in same]))
        squares[same] = _resized(pixels[:, top : top + side, left : left + side], size)
    return squares


def _resized(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Bytes [N, H, W, 3] -> [N, size, size, 3], by Lanczos's filter."""
    from torch.nn import functional as F

    resized = F.interpolate(pixels.permute(0, 3, 1, 2), size=(size, size), mode="lanczos", antialias=True)
    return resized.permute(0, 2, 3, 1)


@functools.cache
def _resizes_bytes() -> bool:
    """Whether this PyTorch has Lanczos's filter."""
    import torch

    try:
        _resized(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), 1)
    except NotImplementedError:
        return False
    return True


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB picture as float32 [3, H, W] in [0, 1]."""
    import torch

    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))  # [H, W, 3]
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def to_batch(pictures: Sequence[NDArray[np.uint8]], device: torch.device | str = "cpu") -> torch.Tensor:
    """RGB pictures [H, W, 3] of one size as float32 [N, 3, H, W] in [0, 1] on `device`: `to_tensor`, all at once.

    In memory the channels of a pixel stay together (`torch.channels_last`), as convolutions want them.
    """
    import torch

    return torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float().div_(255)


def _opened(source: bytes | Path | str, formats: Sequence[str] = tuple(FORMATS)) -> Image.Image:
    """The picture with its header read. Raises `CorruptImage` or `ImageTooLarge`."""
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=tuple(formats))
    except UnidentifiedImageError as error:
        if not (len(source) if isinstance(source, bytes) else Path(source).stat().st_size):
            raise CorruptImage("an empty file, not a picture") from error
        raise CorruptImage(f"not a picture (the formats read are {', '.join(formats)})") from error
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"a picture beyond Pillow's limit of {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels") from error
    except Exception as error:  # as above: a damaged header
        raise CorruptImage(f"a picture that does not open ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
