"""The icon sets of `@iconify/json`: one JSON file a set, of SVG bodies by icon name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.recipes.npm import Package, fetch_package, read_json

ICONS = Package(
    "@iconify/json",
    "2.2.535",
    "sha512-nAV60ACUSHwnsb6fsp+letHlNkrwO4vzBtcC6B4EDHErQQfezk7E3nJdnwJjve6OCfMNO0uVT5Vrgna9/NCmXw==",
)


def read_icon_sets(cache: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The named sets, in that order, each as its JSON file holds it. The package is fetched if `cache` lacks it.

    Raises `DataError` when it cannot be fetched, is not the pinned one, or lacks a set.
    """
    names = list(names)
    found = read_json(fetch_package(ICONS, cache), [f"json/{name}.json" for name in names])
    return {name: found[f"json/{name}.json"] for name in names}


def icon_svg(icon_set: dict[str, Any], name: str) -> str:
    """The icon as an SVG document of its own."""
    icon = icon_set["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icon_set.get("width", 16))
    height = icon.get("height", icon_set.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )
