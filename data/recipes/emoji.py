"""The emoji set: pictures of ten families, captioned in seven languages, as webdataset shards.

Pictures: SVG icons of `@iconify/json`. Names and keywords: Unicode CLDR annotations. All come from the npm registry
at pinned versions, and the shards of two builds are byte-identical. A SentencePiece model (`text.model`) is trained on
the captions of the training split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.atomic import check_unused, new_folder
from data.options import option
from data.recipes.concepts import DERIVED_NAMES, NAMES, fetch_concepts, match_icons
from data.recipes.icon_sets import ICONS, icon_svg, read_icon_sets
from data.recipes.npm import default_cache
from data.recipes.rendering import Picture, write_rendered
from data.recipes.settings import RecipeSettings
from data.recipes.splits import SPLITS, split_of
from data.sample import DataError
from data.shards import Manifest, read_manifest, write_manifest
from data.styles import LANGUAGES, with_style
from data.text import TextTokenizer

FAMILIES = (
    "openmoji", "twemoji", "noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji", "emojione", "emojione-v1",
    "fxemoji", "streamline-emojis",
)  # fmt: skip
# families whose licences let the pictures travel with Apache-2.0 code on a notice alone
PERMISSIVE_FAMILIES = ("noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji", "fxemoji")
TEXT_MODEL = "text.model"
TEXT_PIECES = 8000


@dataclass
class EmojiSource:
    """The parsed packages: every matched picture, and how many icons of each family matched nothing."""

    pictures: list[Picture]
    unmatched: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class EmojiSettings(RecipeSettings):
    """How to build. Raises `DataError` for a value out of range."""

    families: tuple[str, ...] = option(FAMILIES, "Build these families only, as in noto,twemoji; default: all ten.")


def build_emoji(out: Path, settings: EmojiSettings | None = None, progress: bool = True) -> Manifest:
    """Build the shards into the new folder `out`. Icons that fail to render are counted in the manifest.

    Raises `DataError` for an existing `out`, a missing npm client or a changed package.
    """
    out, settings = Path(out), settings or EmojiSettings()
    check_unused(out)
    source = read_source(settings.cache or default_cache(), settings.families)
    with new_folder(out) as building:
        skipped = Counter({f"no name: {family}": count for family, count in source.unmatched.items()})
        splits = write_rendered(building, source.pictures, settings, SPLITS, skipped, progress)
        manifest = Manifest(
            name="emoji",
            image_size=settings.size,
            splits=splits,
            sources={package.name: package.version for package in (ICONS, NAMES, DERIVED_NAMES)},
            skipped=dict(skipped),
        )
        TextTokenizer.train(caption_corpus(source.pictures), building / TEXT_MODEL, TEXT_PIECES)
        write_manifest(building, manifest)
    return read_manifest(out)


def read_source(cache: Path, families: tuple[str, ...] = FAMILIES) -> EmojiSource:
    """Fetch (or find in `cache`) the packages and match every icon to a concept."""
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        raise DataError(f"unknown family {', '.join(unknown)}; known: {', '.join(FAMILIES)}")
    icon_sets = read_icon_sets(cache, FAMILIES)
    concepts = fetch_concepts(cache)
    matches = match_icons(icon_sets, concepts)
    pictures = [
        Picture(
            id=f"{family}-{concept}",
            svg=icon_svg(icon_sets[family], name),
            captions=concepts[concept].captions,
            family=family,
            concept=concept,
            base_concept=concepts[concept].base,
            split=split_of(concepts[concept].base, family),
            licence=icon_sets[family]["info"]["license"]["spdx"],
            source=ICONS.origin,
        )
        for family in families
        for name, concept in matches[family].items()
    ]
    unmatched = {family: len(icon_sets[family]["icons"]) - len(matches[family]) for family in families}
    return EmojiSource(pictures, unmatched)


def caption_corpus(pictures: list[Picture]) -> Iterator[str]:
    """The text that the tokenizer learns from: names, keywords and style phrases of the training pictures, in order."""
    captions = {picture.concept: picture.captions for picture in pictures if picture.split == "train"}
    for concept in sorted(captions):
        for language in LANGUAGES:
            caption = captions[concept][language]
            yield caption.name
            yield ", ".join(caption.keywords)
    for language in LANGUAGES:
        for family in FAMILIES:
            # as often as a common word, so that a style costs a piece or two
            yield from [with_style("", family, language)] * 20
