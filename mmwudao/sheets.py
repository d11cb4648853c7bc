"""A sheet of what a search found as one HTML file: thumbnails that lead to the pictures, with no other files."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

PAGE = """<!doctype html>
<html><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px system-ui, sans-serif; margin: 24px; background: #fafaf9; color: #1c1917 }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 16px }}
figure {{ margin: 0 }}
img {{ width: 100%; height: 220px; object-fit: contain; background: #e7e5e4 }}
figcaption {{ overflow-wrap: anywhere }}
</style></head><body><h1>{title}</h1><main>
{figures}
</main></body></html>
"""
FIGURE = (
    '<figure><a href="{link}"><img src="data:image/jpeg;base64,{picture}" alt=""></a>'
    "<figcaption>{text}</figcaption></figure>"
)
UNLINKED = '<figure><img src="data:image/jpeg;base64,{picture}" alt=""><figcaption>{text}</figcaption></figure>'


@dataclass(frozen=True)
class SheetEntry:
    """A picture, RGB, what is said below it, and the address that it leads to, if any."""

    picture: Image.Image
    text: str
    link: str = ""


def html_sheet(title: str, entries: Sequence[SheetEntry], side: int = 320) -> bytes:
    """The page in UTF-8, with thumbnails of at most `side` pixels a side inside it."""
    figures = []
    for entry in entries:
        thumbnail, buffer = entry.picture.copy(), io.BytesIO()
        thumbnail.thumbnail((side, side), Image.Resampling.LANCZOS)
        thumbnail.save(buffer, "JPEG", quality=85)
        figures.append(
            (FIGURE if entry.link else UNLINKED).format(
                link=html.escape(entry.link),
                picture=base64.b64encode(buffer.getvalue()).decode(),
                text=html.escape(entry.text),
            )
        )
    page = PAGE.format(title=html.escape(title), figures="\n".join(figures))
    return page.encode("utf-8", "backslashreplace")
