"""What an emoji picture shows: names in seven languages (Unicode CLDR), matched to icon names; base concepts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.recipes.npm import Package, fetch_package, read_json
from data.sample import Caption
from data.styles import LANGUAGES

NAMES = Package(
    "cldr-annotations-full",
    "48.2.0",
    "sha512-DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/QJdEc66iHmx3+zLWVIMCFLm0lW7PUQ==",
)
DERIVED_NAMES = Package(
    "cldr-annotations-derived-full",
    "48.2.0",
    "sha512-log62km+AOzI7n/NEuNNFV0mg9DWnt67EYCh1RwxZq9dyRuyteB586LT83Ke8TchEfnwI9cIk2P31zO4nTvZmw==",
)
# skin-tone modifiers, the emoji presentation selector, and the gender signs with the joiner before them
_MODIFIERS = re.compile("[\U0001f3fb-\U0001f3ff\ufe0f]")
_GENDER_SIGNS = re.compile("\u200d[\u2640\u2642]")
# emoji that come as woman, man and person (or girl, boy and child) are one base concept
_GENDERED = {
    "👩👨🧑": "🧑", "👧👦🧒": "🧒", "👵👴🧓": "🧓", "👸🤴🫅": "🫅", "🤶🎅": "🎅", "💃🕺": "💃",
    "👫👬👭": "👫", "👲🧕👳": "👳", "🤵👰": "🤵", "🤰🫃🫄": "🫄",
}  # fmt: skip
_TO_PERSON = {ord(member): person for members, person in _GENDERED.items() for member in members}
# what two people of different skin tones are written as, and what two of one tone are; Santa has three spellings
_SAME = {
    "🧑\u200d🤝\u200d🧑": "👫", "🧑\u200d🐰\u200d🧑": "👯", "🧑\u200d\U0001faef\u200d🧑": "🤼",
    "\U0001faf1\u200d\U0001faf2": "🤝", "🧑\u200d🎄": "🎅",
}  # fmt: skip
_SKIN_TONE = "\U0001f3fb"


@dataclass(frozen=True)
class Concept:
    """An emoji character sequence with its captions, language -> `Caption`."""

    emoji: str
    captions: Mapping[str, Caption]

    @property
    def id(self) -> str:
        """Code points in hex, as `1f600` or `1f468-200d-2695`, without presentation selectors."""
        return code_points(self.emoji)

    @property
    def base(self) -> str:
        """The `id` of the concept without skin tone and gender: what the concept split holds out together."""
        plain = _GENDER_SIGNS.sub("", _MODIFIERS.sub("", self.emoji)).translate(_TO_PERSON)
        plain = _SAME.get(plain, plain) or _SKIN_TONE  # nothing is left of a swatch of skin colour
        members = plain.split("\u200d")
        if len(members) > 1 and set(members) <= {"🧑", "🧒"}:  # families of any size and gender
            plain = "👪"
        elif "🧑" in members and "❤" in members:  # couples; "kiss" also holds the kiss mark
            plain = "💏" if "💋" in members else "💑"
        return code_points(plain)


def code_points(emoji: str) -> str:
    return "-".join(f"{ord(character):x}" for character in emoji if character != "\ufe0f")


def slug(name: str) -> str:
    """An English emoji name as icon sets spell it: "man’s shoe" -> "mans-shoe"."""
    plain = unicodedata.normalize("NFKD", name.lower())
    plain = "".join(character for character in plain if not unicodedata.combining(character))
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"[’'“”.!]", "", plain)).strip("-")


def read_concepts(annotations: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, Concept]:
    """Concepts by id, from CLDR annotations: language -> the `annotations` tables, emoji -> {tts, default}.

    Only emoji named in all seven languages are kept, so that every picture can be asked for in each.
    """
    captions: dict[str, dict[str, Caption]] = {}
    for language in LANGUAGES:
        for table in annotations[language]:
            for emoji, entry in table.items():
                if entry.get("tts"):
                    caption = Caption(entry["tts"][0], tuple(entry.get("default", ())))
                    captions.setdefault(emoji, {})[language] = caption
    concepts = (Concept(emoji, named) for emoji, named in captions.items() if len(named) == len(LANGUAGES))
    return {concept.id: concept for concept in concepts}


def fetch_concepts(cache: Path) -> dict[str, Concept]:
    """`read_concepts` of the pinned CLDR packages, which are fetched if `cache` lacks them.

    Raises `DataError` when one cannot be fetched, or is not the pinned one.
    """
    name_file, derived_file = (fetch_package(package, cache) for package in (NAMES, DERIVED_NAMES))
    names = read_json(name_file, [f"annotations/{language}/annotations.json" for language in LANGUAGES])
    derived = read_json(derived_file, [f"annotationsDerived/{language}/annotations.json" for language in LANGUAGES])
    annotations = {
        language: (
            names[f"annotations/{language}/annotations.json"]["annotations"]["annotations"],
            derived[f"annotationsDerived/{language}/annotations.json"]["annotationsDerived"]["annotations"],
        )
        for language in LANGUAGES
    }
    return read_concepts(annotations)


def match_icons(
    icon_sets: Mapping[str, Mapping[str, Any]], concepts: Mapping[str, Concept]
) -> dict[str, dict[str, str]]:
    """family -> {icon name: concept id}; one icon for each (family, concept).

    In order of trust: the set's own `chars` map; the English name as a slug; the `chars` map of another set that
    uses the same icon name (or an alias of it); the slug without hyphens (fxemoji spells "alarmclock").
    """
    by_slug: dict[str, str] = {}
    for concept in concepts.values():
        by_slug.setdefault(slug(concept.captions["en"].name), concept.id)
    by_letters = {name.replace("-", ""): concept for name, concept in by_slug.items()}
    own = {family: _chars(icons, concepts) for family, icons in icon_sets.items()}
    shared: dict[str, str] = {}
    for family, icons in icon_sets.items():
        for name, concept_id in own[family].items():
            shared.setdefault(name, concept_id)
        for alias, entry in icons.get("aliases", {}).items():
            parent = entry["parent"]
            # an alias that turns or mirrors its parent is another picture
            if parent in own[family] and not entry.keys() & {"rotate", "hFlip", "vFlip"}:
                shared.setdefault(alias, own[family][parent])
    matches: dict[str, dict[str, str]] = {}
    for family, icons in icon_sets.items():
        matched: dict[str, str] = {}
        taken: set[str] = set()
        for table in (own[family], by_slug, shared, by_letters):
            for name in sorted(icons["icons"]):
                candidate = table.get(name)
                if name not in matched and candidate is not None and candidate not in taken:
                    matched[name] = candidate
                    taken.add(candidate)
        matches[family] = matched
    return matches


def _chars(icons: Mapping[str, Any], concepts: Mapping[str, Concept]) -> dict[str, str]:
    """icon name -> concept id, by the set's map of code points (written with or without `fe0f`)."""
    found: dict[str, str] = {}
    for points, name in icons.get("chars", {}).items():
        concept = "-".join(point for point in points.split("-") if point != "fe0f")
        if concept in concepts:
            found.setdefault(name, concept)
    return found
