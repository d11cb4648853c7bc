"""Pictures of every kind that a user has: the right pixels, or one line that says why not."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import CorruptImage, ImageTooLarge, open_image, to_batch, to_rgb, to_square, to_squares, to_tensor
from data.sample import DataError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, depth, colour_type, rows, *extra):
    """A PNG by hand: Pillow writes no 16-bit colour. `rows` are the bytes of the rows, without filter bytes."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def row(content):
    """The pixels of the first row."""
    return [tuple(pixel) for pixel in np.asarray(open_image(content))[0].tolist()]


def test_animated_gif_gives_its_first_frame():
    frames = [Image.new("RGB", (3, 1), colour) for colour in (RED, BLUE, GREEN)]
    assert row(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == [RED] * 3


def test_gif_with_a_transparent_colour_lies_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([*GREEN, *RED])
    image.putpixel((1, 0), 1)
    frames = [image.copy(), Image.new("P", (2, 1))]
    content = encoded(image, "GIF", transparency=0, save_all=True, append_images=frames)
    assert row(content) == [WHITE, RED]


@pytest.mark.parametrize(("kind", "options"), [("TIFF", {}), ("JPEG", {"quality": 95})])
def test_cmyk(kind, options):
    black, none = (0, 0, 0, 255), (0, 0, 0, 0)
    inks = {(0, 255, 255, 0): RED, (255, 0, 255, 0): GREEN, black: (0, 0, 0), none: WHITE}
    for ink, colour in inks.items():
        (pixel,) = row(encoded(Image.new("CMYK", (1, 1), ink), kind, **options))
        assert max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= 2, (ink, pixel)


VALUES = (0, 257, 300, 32768, 40000, 65535)
SCALED = [0, 1, 1, 128, 156, 255]  # v / 257, rounded


def test_16_bit_grey():
    grey = png(len(VALUES), 1, 16, 0, [struct.pack(">6H", *VALUES)])
    assert row(grey) == [(value,) * 3 for value in SCALED]


def test_16_bit_grey_with_a_transparent_value():
    transparent = chunk(b"tRNS", struct.pack(">H", 300))  # 257 is the same 8-bit grey, and stays
    grey = png(len(VALUES), 1, 16, 0, [struct.pack(">6H", *VALUES)], transparent)
    assert row(grey) == [(value,) * 3 for value in (0, 1, 255, 128, 156, 255)]


def test_16_bit_colour():
    pixels = b"".join(struct.pack(">3H", value, 65535 - value, 40000) for value in VALUES)
    found = np.asarray(open_image(png(len(VALUES), 1, 16, 2, [pixels]))).astype(int)[0]
    expected = np.array([(value, 65535 - value, 40000) for value in VALUES]) / 257
    assert np.abs(found - expected).max() <= 1  # Pillow cuts the low byte off


def test_16_bit_colour_with_alpha():
    pixels = struct.pack(">8H", 65535, 0, 0, 65535, 65535, 0, 0, 0)
    assert row(png(2, 1, 16, 6, [pixels])) == [RED, WHITE]


def test_palette_with_transparency():
    palette = chunk(b"PLTE", bytes([*RED, *GREEN, *BLUE]))
    half = chunk(b"tRNS", bytes([255, 0, 51]))  # red opaque, green away, blue a fifth
    assert row(png(3, 1, 8, 3, [bytes([0, 1, 2])], palette, half)) == [RED, WHITE, (204, 204, 255)]


# orientation -> where a picture stored as [[R, G], [B, W], [R, R]] shows its pixels (EXIF 2.3, tag 0x0112)
STORED = np.array([[RED, GREEN], [BLUE, WHITE], [RED, RED]], np.uint8)
UPRIGHT = {
    1: STORED,
    2: STORED[:, ::-1],
    3: STORED[::-1, ::-1],
    4: STORED[::-1],
    5: STORED.transpose(1, 0, 2),
    6: np.rot90(STORED, -1),
    7: STORED[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(STORED),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(STORED), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(np.asarray(open_image(content)), UPRIGHT[orientation])
    with Image.open(io.BytesIO(content)) as opened:  # as a user hands a picture to `encode_image`
        assert np.array_equal(np.asarray(to_rgb(opened)), UPRIGHT[orientation])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as data.images does
@pytest.mark.parametrize("side", [9_000, 12_000, 30_000, 100_000])  # ours refuses, Pillow warns, Pillow refuses
def test_decompression_bomb_is_refused_at_its_header(side):
    with pytest.raises(ImageTooLarge, match="^a picture .* pixels$"):
        open_image(png(side, side, 8, 0, []))  # there is nothing to decode after the header


def test_no_warning_of_pillows_reaches_the_user():
    """In a process of its own: pytest replaces the filters."""
    import subprocess
    import sys

    program = (
        "import sys; from data.images import open_image; from data.sample import DataError\n"
        "try: open_image(sys.stdin.buffer.read())\n"
        "except DataError as error: print(error)"
    )
    bomb = png(12_000, 12_000, 8, 0, [])
    done = subprocess.run([sys.executable, "-c", program], input=bomb, capture_output=True, check=True)
    assert b"12000x12000" in done.stdout
    assert not done.stderr


def test_compressed_text_bomb():
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000)))
    with pytest.raises(DataError, match="does not open|does not decode"):
        open_image(png(1, 1, 8, 0, [b"\0"], bomb))


def test_empty_and_text_are_refused(tmp_path):
    empty, text = tmp_path / "empty.png", tmp_path / "text.png"
    empty.write_bytes(b"")
    text.write_text("a red apple\n" * 100)
    for source in (b"", empty):
        with pytest.raises(CorruptImage, match="^an empty file, not a picture$"):
            open_image(source)
    for source in (text.read_bytes(), text, b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
        with pytest.raises(CorruptImage, match=r"^not a picture \(the formats read are .*\)$"):
            open_image(source)


def test_towers_see_the_same_pixels():
    """`encode_image` takes opened pictures of any mode, as `embed` takes files."""
    from tests.helpers.tiny_towers import ColourTowers

    towers = ColourTowers()
    exif = Image.Exif()
    exif[0x0112] = 6
    for content in (
        encoded(Image.new("RGBA", (9, 9), (255, 0, 0, 51))),
        png(4, 1, 16, 0, [struct.pack(">4H", 300, 32768, 40000, 65535)]),
        encoded(Image.fromarray(STORED), exif=exif),
        encoded(Image.new("CMYK", (9, 9), (0, 255, 0, 0)), "TIFF"),
    ):
        with Image.open(io.BytesIO(content)) as opened:
            assert towers.preprocess(opened).equal(towers.preprocess(open_image(content)))


def test_a_batch_holds_the_numbers_of_its_pictures():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), np.uint8)
    batch = to_batch(list(pictures))
    assert batch.shape == (3, 3, 5, 7)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, torch.stack([to_tensor(Image.fromarray(pixels)) for pixels in pictures]))


def smooth(width, height):
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "least", "found"),
    [((256, 128), 64, (128, 64)), ((256, 128), 65, (256, 128)), ((256, 256), 16, (32, 32)), ((40, 40), 64, (40, 40))],
)
def test_a_jpeg_is_decoded_at_a_fraction(size, least, found):
    content = encoded(smooth(*size), "JPEG", quality=95)
    small = open_image(content, least_side=least)
    assert small.size == found
    whole = open_image(content).resize(found, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(whole).astype(int)).mean() < 3
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    turned = open_image(encoded(smooth(*size), "JPEG", exif=exif), least_side=least)
    assert turned.size == found[::-1]


def test_other_formats_are_decoded_whole():
    for kind in ("PNG", "WEBP", "TIFF"):
        assert open_image(encoded(smooth(64, 64), kind), least_side=8).size == (64, 64)


def test_what_is_rgb_already_is_not_copied(tmp_path):
    image = smooth(8, 8)
    assert to_rgb(image) is image
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert type(to_rgb(opened)) is Image.Image


def test_square_and_tensor():
    wide = Image.new("RGB", (40, 20), RED)
    wide.paste((0, 0, 255), (10, 0, 30, 20))
    square = to_square(wide, 10)
    assert square.size == (10, 10)
    tensor = to_tensor(square)
    assert tensor.shape == (3, 10, 10)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert torch.equal(tensor[:, 5, 5], torch.tensor([0.0, 0.0, 1.0]))
    assert tensor.amax() <= 1


@pytest.mark.parametrize("size", [(128, 128), (90, 64), (61, 80), (40, 40), (300, 33)])
def test_squares_by_pytorch_are_those_of_pillow(size):
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in range(3)]
    pictures = [picture.resize(size, Image.Resampling.BICUBIC) for picture in small]
    other = Image.new("RGB", (50, 50), (10, 200, 30))
    squares = to_squares([pictures[0], other, *pictures[1:]], 40)
    assert (squares.shape, squares.dtype) == ((4, 40, 40, 3), torch.uint8)
    assert squares[1].reshape(-1, 3).unique(dim=0).tolist() == [[10, 200, 30]]
    for square, picture in zip(squares[[0, 2, 3]], pictures, strict=True):
        difference = np.abs(square.numpy().astype(int) - np.asarray(to_square(picture, 40)).astype(int))
        assert difference.max() <= 2
        assert difference.mean() < 0.05
        # one picture alone gives the same bytes
        assert square.equal(to_squares([picture], 40)[0])


def test_squares_of_the_size_that_is_wanted_are_the_pictures():
    pictures = [Image.effect_noise(size, 60).convert("RGB") for size in ((24, 24), (48, 24), (24, 24), (31, 24))]
    found = to_squares(pictures, 24)
    for picture, square in zip(pictures, found, strict=True):
        expected = np.asarray(to_square(picture, 24))
        assert (square.numpy() == expected).all()
