"""Icons of one colour in colours drawn by hash: "red anchor", "white anchor on a blue disc". They teach shapes.

The sets are permissive ones of `@iconify/json` with different hands: outlined, filled, for maps, for medicine. An icon
keeps its concept in every colour as `base_concept`; its `concept` is icon and colours, so that a red anchor and a blue
one are two things.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from data.recipes.icon_sets import ICONS, icon_svg
from data.recipes.rendering import Picture
from data.recipes.splits import HeldOutNames, stable_hash
from data.sample import Caption

MONOCHROME_SETS = (
    "mdi", "tabler", "lucide", "ph", "temaki", "maki", "pinhead", "healthicons", "fontisto", "mingcute", "iconoir",
)  # fmt: skip
COLOURS = {
    "red": "#e02424", "orange": "#f58a07", "yellow": "#f6c915", "green": "#2e9e44", "turquoise": "#14b8a6",
    "blue": "#2463eb", "purple": "#8b3fd1", "pink": "#ec5fa3", "brown": "#8a5a33", "grey": "#8b9099",
    "black": "#111111", "white": "#ffffff",
}  # fmt: skip
_PALE = {"white", "yellow"}  # hardly seen on white
PLATES = {
    "square": '<rect width="100" height="100" rx="14" fill="{colour}"/>',
    "disc": '<circle cx="50" cy="50" r="50" fill="{colour}"/>',
}
PLATE_SHARE = 0.4
_INSET = {"square": 17, "disc": 23}  # of the plate's 100, on each side
# how an icon is drawn, and letters and marks that are no things
_STYLE_WORDS = re.compile(
    r"-(outlined?|filled|fill|solid|line|bold|light|thin|duotone|regular|rounded|sharp|variant|alt|small|"
    r"negative|24px|\d+)$"
)
_NOT_THINGS = re.compile(
    r"(alpha|numeric|letter|number|format|border|brand|currency|roman|syllabary|set|order|square-letter)-.*"
    r"|.*-(logo|off|slash|variant-off)|.*\bletter\b.*|align-.*|.*-(left|right|up|down|x)"
)


def monochrome_pictures(
    icon_sets: dict[str, dict[str, Any]], held_out: HeldOutNames, count: int, skipped: Counter[str]
) -> list[Picture]:
    """The first `count` by hash of the icons of `MONOCHROME_SETS`; what is left out is counted in `skipped`."""
    found = [picture for prefix in MONOCHROME_SETS for picture in _set_pictures(icon_sets[prefix], held_out, skipped)]
    found.sort(key=lambda picture: stable_hash(picture.id))
    return found[:count]


def _set_pictures(icon_set: dict[str, Any], held_out: HeldOutNames, skipped: Counter[str]) -> Iterator[Picture]:
    prefix = icon_set["prefix"]
    brands = {
        icon
        for category, icons in icon_set.get("categories", {}).items()
        for icon in icons
        if "brand" in category.lower()
    }
    for icon in sorted(name for name, entry in icon_set["icons"].items() if not entry.get("hidden")):
        plain = monochrome_name(icon)
        body = icon_set["icons"][icon]["body"]
        if "currentColor" not in body:
            skipped[f"has colours of its own: {prefix}"] += 1
        elif icon in brands or _NOT_THINGS.fullmatch(plain.replace(" ", "-")) or len(plain) < 3:
            skipped[f"logo, letter or mark: {prefix}"] += 1
        elif held_out.shown_by(plain):
            skipped[f"may show a concept of test-concept: {prefix}"] += 1
        else:
            name, svg = _coloured(plain, icon_svg(icon_set, icon), random.Random(stable_hash(f"{prefix}-{icon}")))
            yield Picture(
                id=f"{prefix}-{icon}",
                svg=svg,
                captions={"en": Caption(name, ())},
                family=prefix,
                concept=f"icon-{name.replace(' ', '-')}",
                base_concept=f"icon-{plain.replace(' ', '-')}",
                split="train",
                licence=icon_set["info"]["license"]["spdx"],
                source=ICONS.origin,
            )


def monochrome_name(icon: str) -> str:
    """An icon's id as words, without the style at its end: "anchor-outline" -> "anchor"."""
    plain = icon
    while (shorter := _STYLE_WORDS.sub("", plain)) != plain and shorter:
        plain = shorter
    return plain.replace("-", " ").strip()


def _coloured(name: str, svg: str, rng: random.Random) -> tuple[str, str]:
    """The caption and the drawing, in one colour on white or on a plate of another."""
    if rng.random() >= PLATE_SHARE:
        colour = rng.choice([colour for colour in COLOURS if colour not in _PALE])
        return f"{colour} {name}", svg.replace("currentColor", COLOURS[colour])
    plate = rng.choice(sorted(PLATES))
    ground = rng.choice([colour for colour in COLOURS if colour != "white"])
    dark = ground in {"black", "brown", "purple", "blue", "green", "red", "grey"}
    colour = rng.choice(["white", "white", "yellow"] if dark else ["black", "black", "white"])
    if ground == "yellow":
        colour = "black"
    inset = _INSET[plate]
    inner = re.sub(r'width="[^"]*" height="[^"]*">', "{place}>", svg, count=1).replace(
        "{place}", f'x="{inset}" y="{inset}" width="{100 - 2 * inset}" height="{100 - 2 * inset}"', 1
    )
    article = "an" if ground[0] in "aeiou" else "a"
    return (
        f"{colour} {name} on {article} {ground} {plate}",
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="-4 -4 108 108" '
        f'width="108" height="108">{PLATES[plate].format(colour=COLOURS[ground])}'
        f"{inner.replace('currentColor', COLOURS[colour])}</svg>",
    )
