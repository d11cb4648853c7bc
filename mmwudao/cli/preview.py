"""Thumbnails in the terminal, by its own graphics (Kitty's protocol, sixel) or by coloured half blocks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

ROWS = 12  # of the terminal, for a thumbnail


def check_terminal() -> None:
    """Raise `ValueError` if stdout is no terminal, or one that does not tell its size."""
    if not sys.stdout.isatty():
        raise ValueError("--preview needs a terminal, and stdout is a file or a pipe: use --paths or --sheet")
    if not all(os.get_terminal_size(sys.stdout.fileno())):
        raise ValueError("--preview needs the size of the terminal, which this one gives as 0: use --paths or --sheet")


def show_thumbnails(pictures: Sequence[Image.Image | None], labels: Sequence[str]) -> None:
    """Print each label, and below it its picture, if there is one. Raises `ValueError` if stdout is no terminal."""
    check_terminal()
    from rich.console import Console
    from rich.text import Text
    from textual_image.renderable import Image as TerminalImage  # asks the terminal what it can when it is imported

    console = Console()
    for picture, label in zip(pictures, labels, strict=True):
        console.print(Text(label), soft_wrap=True)
        if picture is not None:
            console.print(TerminalImage(picture, width="auto", height=ROWS))
