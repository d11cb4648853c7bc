"""What commands that draw share: the folder for the pictures, the progress bar, and what is printed at the end."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from mmwudao.pipeline import DrawingProgress

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".npy")
PREVIEW_ROWS = 2  # rows of codes between two previews


def check_png(path: Path) -> None:
    """Raises `ValueError` for a file name that is not that of a PNG, which can hold the recipe of a picture."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: a PNG is written, so give a name that ends in .png")


def check_folder_name(folder: Path) -> None:
    """Raises `ValueError` for a folder that is not there and has the name of a picture."""
    if folder.suffix.lower() in PICTURE_SUFFIXES and not folder.is_dir():
        raise ValueError(f"{folder}: -o names the folder that files are written into, not a file")


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and check that it can be written, before the work; remove it again if the work fails."""
    check_folder_name(folder)
    missing = []
    parent = folder
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        yield
    except BaseException:
        for made in missing:
            with contextlib.suppress(OSError):  # not made yet, or no longer empty
                made.rmdir()
        raise


@contextlib.contextmanager
def drawing_progress(
    preview: Path | None = None, columns: int | None = None
) -> Iterator[Callable[[DrawingProgress], None]]:
    """A callback for `Pipeline.generate` that moves a bar (on a terminal) and keeps `preview` up to date."""
    from tqdm import tqdm

    from data.atomic import write_files
    from mmwudao.pictures import encode_png, grid

    with tqdm(desc="drawing", disable=not sys.stderr.isatty(), leave=False) as bar:
        shown = -1

        def on_progress(progress: DrawingProgress) -> None:
            nonlocal shown
            bar.total = progress.total
            bar.update(progress.done - bar.n)
            if preview is not None and progress.rows // PREVIEW_ROWS != shown:
                shown = progress.rows // PREVIEW_ROWS
                write_files({preview: encode_png(grid(progress.preview(), columns))})

        try:
            yield on_progress
        except BaseException:
            if preview is not None:
                preview.unlink(missing_ok=True)
            raise


def print_pictures(pictures: list[Path], sheet: Path, images: list[Image.Image], as_json: bool) -> None:
    """The path of each picture and that of the sheet; in JSON with the recipes."""
    if as_json:
        for path, image in zip(pictures, images, strict=True):
            print(json.dumps({"path": str(path), "grid": str(sheet), **image.info}, ensure_ascii=False))
    else:
        for path in pictures:
            print(path)
        print(f"sheet: {sheet}")
