"""Pictures on disk: the recipe inside a PNG, the sheet of several pictures, and writing all of them or none."""

from __future__ import annotations

import io
import math
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from PIL import Image, ImageChops, PngImagePlugin

from data.atomic import write_files
from generation.drawing.sampling import SamplingOptions
from mmwudao.version import __version__

SOFTWARE = "mmwudao"
SAMPLING_FIELDS: dict[str, type] = get_type_hints(SamplingOptions)
# Every field a picture can be drawn again from, with its type. `OPTIONAL_FIELDS` may be absent.
RECIPE_FIELDS: dict[str, type] = {
    "prompt": str,
    "style": str,
    "text": str,  # what the model read: the prompt with the style's phrase
    "seed": int,
    "like": str,  # the vector of a picture that took the place of the prompt's
    **SAMPLING_FIELDS,
    "model": str,
    "model_hash": str,
    "tokenizer_hash": str,
    "adapter_hash": str,
    "towers_hash": str,  # of a generator that reads their vectors
    "device": str,
    "dtype": str,
    "engine": str,
    "version": str,
}
# An older version may not have known a sampling option: it drew as the option's default does.
OPTIONAL_FIELDS = frozenset({"style", "like", "adapter_hash", "towers_hash", "engine", *SAMPLING_FIELDS})
# What else a picture tells: how well its prompt describes it, and what was kept of another picture.
NOTES = ("score", "kept")
SEEDS = range(2**63)
MAX_STEM_BYTES = 60  # of the prompt's part of a file name; file systems stop at 255


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes with the recipe in `image.info`, if it holds one, as one iTXt (UTF-8) chunk a field."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("Software", f"{SOFTWARE} {__version__}")
    for name in (*RECIPE_FIELDS, *NOTES):
        if image.info.get(name) is not None:
            chunks.add_itxt(name, str(image.info[name]))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def read_recipe(path: Path | str) -> dict[str, Any]:
    """The recipe inside a PNG that `generate` wrote: the fields of `RECIPE_FIELDS` that it holds.

    Raises `ValueError` when the file is missing, is no PNG, or holds no recipe of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no picture at {path}")
    try:
        with Image.open(path) as image:
            image.load()
            text = dict(image.text) if isinstance(image, PngImagePlugin.PngImageFile) else {}
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's words for a broken file
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    missing = [name for name in RECIPE_FIELDS if name not in text and name not in OPTIONAL_FIELDS]
    if not text.get("Software", "").startswith(SOFTWARE) or missing:
        raise ValueError(f"{path} holds no recipe: it is not one of the pictures `mmwudao generate` writes")
    if "kept" in text:
        raise ValueError(f"{path} was completed from another picture: only pictures drawn whole can be drawn again")
    try:
        recipe = {name: kind(text[name]) for name, kind in RECIPE_FIELDS.items() if name in text}
        SamplingOptions(**{name: recipe[name] for name in SAMPLING_FIELDS if name in recipe})
        if recipe["seed"] not in SEEDS:
            raise ValueError(f"a seed lies in 0..{SEEDS.stop - 1}, not {recipe['seed']}")
    except ValueError as error:
        raise ValueError(f"{path} holds a damaged recipe: {error}") from error
    return recipe


def differing_pixels(path: Path | str, image: Image.Image) -> int:
    """How many pixels of the picture at `path` differ from `image`; all of them when the sizes differ."""
    with Image.open(path) as stored:
        original = stored.convert("RGB")
    if original.size != image.size:
        return image.width * image.height
    red, green, blue = ImageChops.difference(original, image).split()
    largest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    return image.width * image.height - largest.histogram()[0]


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """One sheet of pictures, row by row, on white. Without `columns`, about as many as rows.

    Raises `ValueError` for no picture or fewer than one column.
    """
    if not images:
        raise ValueError("a sheet needs at least one picture")
    if columns is None:
        columns = math.ceil(math.sqrt(len(images)))
    if columns < 1:
        raise ValueError(f"a sheet needs at least one column, not {columns}")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    width, height = max(image.width for image in images), max(image.height for image in images)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for k, image in enumerate(images):
        row, column = divmod(k, columns)
        sheet.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def file_stem(prompt: str, seed: int) -> str:
    """A file name, without its extension, that shows the prompt and the seed: letters, marks and digits only."""
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in prompt)
    words = "-".join(kept.split()).encode()[:MAX_STEM_BYTES].decode(errors="ignore").strip("-")
    try:
        os.fsencode(words)
    except UnicodeEncodeError:  # the file system's encoding (an old locale) has no such letters
        words = ""
    return f"{words or 'picture'}-{seed}"


def unused_path(folder: Path, stem: str, extension: str = ".png", taken: frozenset[Path] = frozenset()) -> Path:
    """`folder/stem.png`, or `stem-2.png`, `stem-3.png`, ... when that exists or is `taken`."""
    path, number = folder / f"{stem}{extension}", 1
    while path.exists() or path in taken:
        number += 1
        path = folder / f"{stem}-{number}{extension}"
    return path


def write_pictures(folder: Path, images: Sequence[Image.Image], stems: Sequence[str] | None = None) -> list[Path]:
    """Write each picture into `folder`, all or none, under unused names that begin with `stems`; returns the paths.

    Without `stems`, drawn pictures are named after their prompts and seeds.
    """
    files = _named_files(folder, images, stems)
    write_files(files)
    return list(files)


def write_pictures_and_sheet(
    folder: Path, images: Sequence[Image.Image], columns: int | None = None
) -> tuple[list[Path], Path]:
    """Write drawn pictures and grid.png, a sheet of all (see `grid`), all or none; returns paths and sheet."""
    files = _named_files(folder, images)
    paths, sheet = list(files), unused_path(folder, "grid", taken=frozenset(files))
    write_files({**files, sheet: encode_png(grid(images, columns))})
    return paths, sheet


def _named_files(folder: Path, images: Sequence[Image.Image], stems: Sequence[str] | None = None) -> dict[Path, bytes]:
    if stems is None:
        stems = [file_stem(image.info["prompt"], image.info["seed"]) for image in images]
    files: dict[Path, bytes] = {}
    for stem, image in zip(stems, images, strict=True):
        files[unused_path(folder, stem, taken=frozenset(files))] = encode_png(image)
    return files
