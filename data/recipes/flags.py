"""Flags of countries by six hands, named in seven languages as the emoji set names them.

A flag is the emoji of its country: it has that concept, CLDR's names of it ("flag: France", "旗: 法国", ...), and the
split that the emoji recipe gives to it, so that no flag is trained on whose emoji are held out. The names of the
country in `world-countries` are keywords.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.atomic import check_unused, new_folder
from data.recipes.concepts import DERIVED_NAMES, NAMES, Concept, code_points, fetch_concepts
from data.recipes.icon_sets import ICONS, icon_svg, read_icon_sets
from data.recipes.npm import Package, default_cache, fetch_package, read_json, read_members
from data.recipes.rendering import Picture, write_rendered
from data.recipes.settings import RecipeSettings
from data.recipes.splits import SPLITS, split_of
from data.sample import Caption, DataError
from data.shards import Manifest, read_manifest, write_manifest
from data.styles import LANGUAGES

COUNTRIES = Package(
    "world-countries",
    "5.1.0",
    "sha512-CXR6EBvTbArDlDDIWU3gfKb7Qk0ck2WNZ234b/A0vuecPzIfzzxH+O6Ejnvg1sT8XuiZjVlzOH0h08ZtaO7g0w==",
)
COUNTRIES_LICENCE = "ODbL-1.0"
FLAG_SETS = ("circle-flags", "flag", "flagpack", "cif")
# how world-countries calls our languages (ISO 639-2), but English, which it has apart
_TRANSLATIONS = {"zh": "zho", "fr": "fra", "de": "deu", "cs": "ces", "ja": "jpn", "ko": "kor"}
# codes of circle-flags whose picture is a language's (Arabic, Interlingue, Ido, Latin), not the country's
_OF_LANGUAGES = {"ar", "ie", "io", "la"}
_REGION = re.compile(r"[a-z]{2}|gb-(eng|sct|wls)")
_MARGIN = 0.04  # of the width, on each side, as emoji have it


@dataclass(frozen=True)
class _Flag:
    """A flag by one hand: a two-letter code of ISO 3166-1 (or "gb-eng"), the drawing, its family and its origin."""

    region: str
    svg: str
    family: str
    licence: str
    source: str


def build_flags(out: Path, settings: RecipeSettings | None = None, progress: bool = True) -> Manifest:
    """Build the shards into the new folder `out`. What is left out is counted in the manifest, by reason.

    Raises `DataError` for an existing `out`, a missing npm client or a changed package.
    """
    out, settings = Path(out), settings or RecipeSettings()
    check_unused(out)
    cache = settings.cache or default_cache()
    concepts = fetch_concepts(cache)
    country_file = fetch_package(COUNTRIES, cache)
    countries = read_json(country_file, ["countries.json"])["countries.json"]
    drawings = read_members(country_file, [f"data/{country['cca3'].lower()}.svg" for country in countries])
    flags = [*_country_flags(countries, drawings), *_set_flags(read_icon_sets(cache, FLAG_SETS))]
    skipped: Counter[str] = Counter()
    pictures = list(_pictures(flags, concepts, country_names(countries, concepts), skipped))
    with new_folder(out) as building:
        splits = write_rendered(building, pictures, settings, SPLITS, skipped, progress)
        sources = {package.name: package.version for package in (COUNTRIES, ICONS, NAMES, DERIVED_NAMES)}
        write_manifest(building, Manifest("flags", settings.size, splits, sources, dict(skipped)))
    return read_manifest(out)


def region_emoji(region: str) -> str:
    """The flag emoji of a region: two regional indicators, or the black flag with tags for "gb-eng"."""
    if len(region) == 2:
        return "".join(chr(0x1F1E6 + ord(letter) - ord("a")) for letter in region)
    tags = "".join(chr(0xE0000 + ord(letter)) for letter in region.replace("-", ""))
    return f"\U0001f3f4{tags}\U000e007f"


def country_names(
    countries: list[dict[str, Any]], concepts: Mapping[str, Concept]
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Two-letter code -> language -> the common and the official name.

    A name is left out where CLDR gives it to another country: the package calls the British Indian Ocean Territory
    India in Korean, for one.
    """
    taken: dict[tuple[str, str], str] = {}
    for country in countries:
        region = country["cca2"].lower()
        if code_points(region_emoji(region)) in concepts:
            for language, caption in concepts[code_points(region_emoji(region))].captions.items():
                taken[language, _without_flag(caption.name)] = region
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for country in countries:
        region = country["cca2"].lower()
        for language in LANGUAGES:
            entry = country["name"] if language == "en" else country["translations"].get(_TRANSLATIONS[language], {})
            names = dict.fromkeys(name for name in (entry.get("common"), entry.get("official")) if name)
            kept = tuple(name for name in names if taken.get((language, name), region) == region)
            found.setdefault(region, {})[language] = kept
    return found


def _pictures(
    flags: list[_Flag],
    concepts: Mapping[str, Concept],
    names: Mapping[str, Mapping[str, tuple[str, ...]]],
    skipped: Counter[str],
) -> Iterator[Picture]:
    for flag in flags:
        if flag.family == "circle-flags" and flag.region in _OF_LANGUAGES:
            skipped[f"flag of a language: {flag.family}"] += 1
            continue
        concept = concepts.get(code_points(region_emoji(flag.region))) if _REGION.fullmatch(flag.region) else None
        if concept is None:
            skipped[f"no name: {flag.family}"] += 1
            continue
        captions = {
            language: Caption(caption.name, (*caption.keywords, *names.get(flag.region, {}).get(language, ())))
            for language, caption in concept.captions.items()
        }
        yield Picture(
            id=f"{flag.family}-{flag.region}",
            svg=framed(flag.svg, circle=flag.family == "circle-flags"),
            captions=captions,
            family=flag.family,
            concept=concept.id,
            base_concept=concept.base,
            split=split_of(concept.base, flag.family),
            licence=flag.licence,
            source=flag.source,
        )


def _country_flags(countries: list[dict[str, Any]], drawings: Mapping[str, bytes]) -> Iterator[_Flag]:
    for country in countries:
        svg = drawings[f"data/{country['cca3'].lower()}.svg"].decode()
        yield _Flag(country["cca2"].lower(), svg, COUNTRIES.name, COUNTRIES_LICENCE, COUNTRIES.origin)


def _set_flags(icon_sets: Mapping[str, dict[str, Any]]) -> Iterator[_Flag]:
    for prefix, icon_set in icon_sets.items():
        licence = icon_set["info"]["license"]["spdx"]
        for icon in sorted(name for name, entry in icon_set["icons"].items() if not entry.get("hidden")):
            region, shape = re.fullmatch(r"(.*?)(-4x3|-1x1)?", icon).groups()  # type: ignore[union-attr]
            yield _Flag(region, icon_svg(icon_set, icon), f"{prefix}{shape or ''}", licence, ICONS.origin)


def _without_flag(name: str) -> str:
    """ "flag: France" -> "France", in any of the languages."""
    return name.partition(":")[2].strip()


def framed(svg: str, circle: bool = False) -> str:
    """The drawing within a thin grey frame and a margin, so that white fields end somewhere on the white square.

    Raises `DataError` for an SVG document without a size.
    """
    root = re.search(r"<svg\b[^>]*>", svg)
    attributes = dict(re.findall(r'([\w:]+)\s*=\s*"([^"]*)"', root[0])) if root else {}
    box = attributes.get("viewBox", "").replace(",", " ").split()
    sides = [re.match(r"[\d.]+", attributes.get(name, "")) for name in ("width", "height")]
    if all(sides):
        width, height = (float(side[0]) for side in sides if side)
    elif len(box) == 4:
        width, height = float(box[2]), float(box[3])
    else:
        raise DataError("a flag's SVG document has neither a width and height nor a viewBox")
    assert root is not None
    attributes.setdefault("viewBox", f"0 0 {width:g} {height:g}")
    attributes |= {"x": "0", "y": "0", "width": f"{width:g}", "height": f"{height:g}"}
    inner = "<svg " + " ".join(f'{name}="{value}"' for name, value in attributes.items()) + ">"
    margin, stroke = _MARGIN * width, f'fill="none" stroke="#bbb" stroke-width="{0.012 * width:g}"'
    frame = (
        f'<circle cx="{width / 2:g}" cy="{height / 2:g}" r="{width / 2:g}" {stroke}/>'
        if circle
        else f'<rect width="{width:g}" height="{height:g}" {stroke}/>'
    )
    outer = f"{-margin:g} {-margin:g} {width + 2 * margin:g} {height + 2 * margin:g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{outer}" '
        # the renderer rounds a document's sides to whole pixels, and some flags are 3 x 2
        f'width="1000" height="{1000 * (height + 2 * margin) / (width + 2 * margin):g}">'
        f"{inner}{svg[root.end() :]}{frame}</svg>"
    )
