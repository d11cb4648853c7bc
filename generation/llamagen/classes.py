"""The names of the classes that LlamaGen's class-conditional models draw: ImageNet's 1,000, or those of a file."""

from __future__ import annotations

from pathlib import Path

from data.characters import decode_text
from vqvae.storage.parts import ModelError

IMAGENET = 1000


def class_names(count: int, path: Path | None = None) -> list[list[str]]:
    """The names of each of `count` classes; none where only numbers are known.

    A line of the file is a class, with its names separated by commas. Raises `ModelError` for a file of other length.
    """
    if path is not None:
        try:
            lines = decode_text(path.read_bytes()).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} cannot be read as text: {error}") from error
        if len(lines) != count:
            raise ModelError(f"{path} names {len(lines)} classes, and the model draws {count}")
        return [_names(line) for line in lines]
    if count != IMAGENET:
        return [[] for _ in range(count)]
    from timm.data import ImageNetInfo

    info = ImageNetInfo()  # in the order of the folders' names, as the models were trained
    return [_names(info.index_to_description(number)) for number in range(count)]


def _names(line: str) -> list[str]:
    return [name for name in map(str.strip, line.split(",")) if name]
