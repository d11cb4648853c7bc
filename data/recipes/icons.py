"""Colour icons beside the emoji: the sets of `@iconify/json` under MIT, Apache-2.0, ISC or CC0, named in English.

Left out are the sets of logos and of programming, which is much the same, and flags, which `data.recipes.flags` builds
with names in seven languages; so is every icon that may show a concept of the emoji set's `test-concept`, so that
training on both data sets keeps what was held out unseen.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.atomic import check_unused, new_folder
from data.recipes.concepts import fetch_concepts
from data.recipes.icon_sets import ICONS, icon_svg, read_icon_sets
from data.recipes.monochrome import MONOCHROME_SETS, monochrome_pictures
from data.recipes.npm import default_cache
from data.recipes.rendering import Picture, write_rendered
from data.recipes.settings import IconSettings
from data.recipes.splits import HeldOutNames
from data.sample import Caption
from data.shards import Manifest, read_manifest, write_manifest

ICON_SETS = ("icon-park", "glyphs-poly", "marketeq", "meteocons", "fluent-color", "flat-color-icons", "flat-ui")
# sets for the types of files and folders: half of them logos, of which those that a set of logos names are left out
FILE_TYPES = ("material-icon-theme", "vscode-icons", "catppuccin")
LOGOS = ("logos", "simple-icons", "devicon", "skill-icons")
# whole sets of other looks than those that are trained on, as foreign pictures
HELD_OUT_SETS = ("flat-color-icons", "flat-ui")
ICON_SPLITS = ("train", "test-icons")

# what is a variant and no part of the name, at its end
_VARIANTS = {
    "icon-park": r"-(one|two|three|four|five|six)$",
    "fluent-color": r"-\d+$",  # pixels
    "meteocons": r"-fill$",
    "material-icon-theme": r"-light$",
    "vscode-icons": r"(-official|\d+)$",
    "catppuccin": r"$^",
}
_VARIANT = r"(-(alt|outline|filled|fill|solid|line))?-?\d*$"  # of the others
_FOLDER = re.compile(r"(?:default-)?(?:root-)?folder(?:-type)?(?:-light)?(?:-(?P<of>.+?))??(?P<open>-open(?:ed)?)?")
_MISSPELT = {
    "allert": "alert", "appartment": "apartment", "bikecycle": "bicycle", "brdige": "bridge", "colum": "column",
    "contrass": "contrast", "couldron": "cauldron", "hastag": "hashtag", "icecream": "ice cream",
    "informatio": "information", "lettersymbol": "letter symbol", "magicmouse": "magic mouse", "platte": "palette",
    "squre": "square", "ubmrella": "umbrella", "yinyang": "yin yang",
}  # fmt: skip
# what an animation lets appear, such as drops of rain: the renderer draws the first moment alone
_FADED_IN = re.compile(r'opacity="0"(?=><animate)')
# categories that say nothing about a picture
_VAGUE = {"Abstract", "Base", "Components", "Edit", "Operate", "Others"}


def build_icons(out: Path, settings: IconSettings | None = None, progress: bool = True) -> Manifest:
    """Build the shards into the new folder `out`. What is left out is counted in the manifest, by reason and set.

    With `settings.monochrome`, that many icons of `data.recipes.monochrome` are built instead.
    Raises `DataError` for an existing `out`, a missing npm client or a changed package.
    """
    out, settings = Path(out), settings or IconSettings()
    check_unused(out)
    cache = settings.cache or default_cache()
    held_out = HeldOutNames(fetch_concepts(cache).values())
    skipped: Counter[str] = Counter()
    if settings.monochrome:
        sets = read_icon_sets(cache, MONOCHROME_SETS)
        pictures = monochrome_pictures(sets, held_out, settings.monochrome, skipped)
    else:
        sets = read_icon_sets(cache, (*ICON_SETS, *FILE_TYPES, *LOGOS) if settings.file_types else ICON_SETS)
        pictures = list(icon_pictures(sets, held_out, skipped))
    name, splits = ("monochrome", ("train",)) if settings.monochrome else ("icons", ICON_SPLITS)
    with new_folder(out) as building:
        shards = write_rendered(building, pictures, settings, splits, skipped, progress)
        write_manifest(building, Manifest(name, settings.size, shards, {ICONS.name: ICONS.version}, dict(skipped)))
    return read_manifest(out)


def icon_pictures(
    icon_sets: dict[str, dict[str, Any]], held_out: HeldOutNames, skipped: Counter[str]
) -> Iterator[Picture]:
    """The pictures of the sets, but of those of `LOGOS`; what is left out is counted in `skipped`."""
    logos = {_brand(name) for prefix in LOGOS if prefix in icon_sets for name in icon_sets[prefix]["icons"]}
    for prefix, icon_set in icon_sets.items():
        if prefix in LOGOS:
            continue
        categories = _categories(icon_set)
        split = "test-icons" if prefix in HELD_OUT_SETS else "train"
        for icon in _largest(icon_set, prefix, skipped):
            name = icon_name(icon, prefix)
            keywords = tuple(sorted(category.lower() for category in categories.get(icon, set()) - _VAGUE))
            if len(name) < 2 or name.isdigit():
                skipped[f"no name: {prefix}"] += 1
            elif "brand" in keywords or (prefix in FILE_TYPES and _is_logo(icon, logos)):
                skipped[f"logo: {prefix}"] += 1
            elif split == "train" and held_out.shown_by(name):
                skipped[f"may show a concept of test-concept: {prefix}"] += 1
            else:
                concept = f"icon-{name.replace(' ', '-')}"
                yield Picture(
                    id=f"{prefix}-{icon}",
                    svg=_FADED_IN.sub('opacity="1"', icon_svg(icon_set, icon)),
                    captions={"en": Caption(name, keywords)},
                    family=prefix,
                    concept=concept,
                    base_concept=concept,
                    split=split,
                    licence=icon_set["info"]["license"]["spdx"],
                    source=ICONS.origin,
                )


def icon_name(icon: str, prefix: str) -> str:
    """An icon's id as English words: "apple-one" of icon-park -> "apple", "folder-docs-open" -> "open docs folder"."""
    plain = re.sub(_VARIANTS.get(prefix, _VARIANT), "", icon) or icon
    if prefix in FILE_TYPES:
        plain = re.sub(r"^file-type-(light-)?", "", plain)
        folder = _FOLDER.fullmatch(plain)
        if folder:
            plain = "-".join(filter(None, ("open" if folder["open"] else "", folder["of"], "folder")))
    return " ".join(_MISSPELT.get(word, word) for word in plain.split("-") if word)


def _categories(icon_set: dict[str, Any]) -> dict[str, set[str]]:
    """icon -> the categories that list it."""
    found: dict[str, set[str]] = {}
    for category, icons in icon_set.get("categories", {}).items():
        for icon in icons:
            found.setdefault(icon, set()).add(category)
    return found


def _largest(icon_set: dict[str, Any], prefix: str, skipped: Counter[str]) -> list[str]:
    """The icons that the set shows; of one that fluent-color has in several sizes, the largest alone."""
    icons = sorted(icon for icon, entry in icon_set["icons"].items() if not entry.get("hidden"))
    if prefix != "fluent-color":
        return icons
    sizes: dict[str, list[int]] = {}
    for icon in icons:
        plain, _, size = icon.rpartition("-")
        sizes.setdefault(plain, []).append(int(size))
    skipped[f"smaller size: {prefix}"] += len(icons) - len(sizes)
    return [f"{plain}-{max(found)}" for plain, found in sorted(sizes.items())]


def _is_logo(icon: str, logos: set[str]) -> bool:
    """Whether an icon for a type of file begins, behind what says so, with the name of a logo."""
    plain = re.sub(r"^(file-type-|folder-type-|folder-)(light-)?", "", icon)
    return _brand(re.sub(r"-open(ed)?$", "", plain)) in logos or _brand(plain.partition("-")[0]) in logos


def _brand(name: str) -> str:
    """A logo's id without what only says how it is drawn."""
    plain = re.sub(r"-(icon|wordmark|light|dark|alt|official)$", "", name)
    return re.sub(r"\d+$", "", plain).replace("-", "")
