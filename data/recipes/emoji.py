"""The emoji set: pictures of ten families, captioned in seven languages, as webdataset shards.

Pictures: SVG icons of `@iconify/json`. Names and keywords: Unicode CLDR annotations. All come from the npm registry
at pinned versions, and the shards of two builds are byte-identical. A SentencePiece model (`text.model`) is trained on
the captions of the training split.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.atomic import check_unused, new_folder
from data.batches import cores
from data.options import check_options, option
from data.recipes.concepts import Concept, match_icons, read_concepts
from data.recipes.npm import Package, default_cache, fetch_package, read_json
from data.sample import DataError, Sample
from data.shards import Manifest, ShardInfo, ShardWriter, read_manifest, write_manifest
from data.styles import LANGUAGES, with_style
from data.text import TextTokenizer

ICONS = Package(
    "@iconify/json",
    "2.2.535",
    "sha512-nAV60ACUSHwnsb6fsp+letHlNkrwO4vzBtcC6B4EDHErQQfezk7E3nJdnwJjve6OCfMNO0uVT5Vrgna9/NCmXw==",
)
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
FAMILIES = (
    "openmoji", "twemoji", "noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji", "emojione", "emojione-v1",
    "fxemoji", "streamline-emojis",
)  # fmt: skip
# families whose licences let the pictures travel with Apache-2.0 code on a notice alone
PERMISSIVE_FAMILIES = ("noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji", "fxemoji")
DEFAULT_SIZE = 128  # px, the size of the shipped model
SPLITS = ("train", "test-concept", "test-family")
HELD_OUT = 0.05
TEXT_MODEL = "text.model"
TEXT_PIECES = 8000


@dataclass(frozen=True)
class Picture:
    """An icon to render: the SVG document and what it shows."""

    id: str
    svg: str
    family: str
    concept: Concept
    licence: str


@dataclass
class EmojiSource:
    """The parsed packages: every matched picture, and how many icons of each family matched nothing."""

    pictures: list[Picture]
    unmatched: dict[str, int]


@dataclass(frozen=True)
class EmojiSettings:
    """How to build. Raises `DataError` for a value out of range."""

    size: int = option(DEFAULT_SIZE, "Render pictures of this many pixels a side.", least=8, most=2048)
    image_format: str = option("webp", "Store the pictures as webp (lossless) or png.")
    samples_per_shard: int = option(2000, "Put at most this many samples into one tar file.", least=1)
    families: tuple[str, ...] = option(FAMILIES, "Build these families only, as in noto,twemoji; default: all ten.")
    limit: int | None = option(None, "Keep this many pictures only, chosen by hash.", least=1)
    cache: Path | None = option(None, "Keep the fetched packages in this folder.")
    workers: int | None = option(None, "Render in this many processes; default: one a core.", least=1)

    def __post_init__(self) -> None:
        try:
            check_options(self)
        except ValueError as error:
            raise DataError(str(error)) from error
        if self.image_format not in ("webp", "png"):
            raise DataError(f"the image format is 'webp' or 'png', not {self.image_format!r}")


def build_emoji(out: Path, settings: EmojiSettings | None = None, progress: bool = True) -> Manifest:
    """Build the shards into the new folder `out`. Icons that fail to render are counted in the manifest.

    Raises `DataError` for an existing `out`, a missing npm client or a changed package.
    """
    out, settings = Path(out), settings or EmojiSettings()
    check_unused(out)
    source = read_source(settings.cache or default_cache(), settings.families)
    with new_folder(out) as building:
        skipped = Counter({f"no name: {family}": count for family, count in source.unmatched.items()})
        splits = _write_shards(building, source, settings, skipped, progress)
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


def _write_shards(
    folder: Path, source: EmojiSource, settings: EmojiSettings, skipped: Counter[str], progress: bool
) -> dict[str, list[ShardInfo]]:
    """Render the pictures and write the shards of each split; what fails is counted in `skipped`."""
    pictures = sorted(source.pictures, key=lambda picture: _hash(picture.id))[: settings.limit]
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(folder, split, settings.samples_per_shard)) for split in SPLITS
        }
        pool = stack.enter_context(ProcessPoolExecutor(settings.workers or cores()))
        jobs = ((picture.svg, settings.size, settings.image_format) for picture in pictures)
        rendered = pool.map(_render, *zip(*jobs, strict=True), chunksize=16)
        bar = tqdm(zip(pictures, rendered, strict=True), "rendering", len(pictures), disable=not progress)
        for picture, (image, problem) in bar:
            if image is None:
                skipped[f"render failed: {picture.id}: {problem}"] += 1
            else:
                sample = _sample(picture, image, settings.image_format)
                writers[split_of(picture.concept, picture.family)].write(sample)
    return {split: writer.shards for split, writer in writers.items()}


def split_of(concept: Concept, family: str) -> str:
    """The split of a picture, by hash alone, so that it never depends on what else is built.

    `test-concept`: 5 % of base concepts, in all families. `test-family`: 5 % of the remaining (base concept, family)
    pairs; the concept is then seen in training in another family.
    """
    if _fraction(f"concept:{concept.base}") < HELD_OUT:
        return "test-concept"
    if _fraction(f"family:{concept.base}:{family}") < HELD_OUT:
        return "test-family"
    return "train"


def read_source(cache: Path, families: tuple[str, ...] = FAMILIES) -> EmojiSource:
    """Fetch (or find in `cache`) the packages and match every icon to a concept."""
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        raise DataError(f"unknown family {', '.join(unknown)}; known: {', '.join(FAMILIES)}")
    icon_file, name_file, derived_file = (fetch_package(package, cache) for package in (ICONS, NAMES, DERIVED_NAMES))
    names = read_json(name_file, [f"annotations/{language}/annotations.json" for language in LANGUAGES])
    derived = read_json(derived_file, [f"annotationsDerived/{language}/annotations.json" for language in LANGUAGES])
    annotations = {
        language: (
            names[f"annotations/{language}/annotations.json"]["annotations"]["annotations"],
            derived[f"annotationsDerived/{language}/annotations.json"]["annotationsDerived"]["annotations"],
        )
        for language in LANGUAGES
    }
    concepts = read_concepts(annotations)
    icon_sets = dict(zip(FAMILIES, _icon_sets(icon_file), strict=True))
    matches = match_icons(icon_sets, concepts)
    pictures = [
        Picture(
            id=f"{family}-{concept}",
            svg=_svg(icon_sets[family], name),
            family=family,
            concept=concepts[concept],
            licence=icon_sets[family]["info"]["license"]["spdx"],
        )
        for family in families
        for name, concept in matches[family].items()
    ]
    unmatched = {family: len(icon_sets[family]["icons"]) - len(matches[family]) for family in families}
    return EmojiSource(pictures, unmatched)


def _icon_sets(tarball: Path) -> Iterator[dict[str, Any]]:
    found = read_json(tarball, [f"json/{family}.json" for family in FAMILIES])
    return (found[f"json/{family}.json"] for family in FAMILIES)


def _svg(icons: dict[str, Any], name: str) -> str:
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def _render(svg: str, size: int, image_format: str) -> tuple[bytes | None, str]:
    """The encoded picture on a white square, or None and the reason. Runs in a worker process."""
    import resvg_py
    from PIL import Image

    try:
        # fonts of the machine would make two builds differ
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))
    except ValueError as error:
        return None, " ".join(str(error).split())
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    square = Image.new("RGB", (size, size), "white")
    square.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2), drawn.getchannel("A"))
    if square.getextrema() == ((255, 255),) * 3:
        return None, "the picture is empty"
    encoded = io.BytesIO()
    if image_format == "webp":
        square.save(encoded, "WEBP", lossless=True, method=1, quality=50)
    else:
        square.save(encoded, "PNG")
    return encoded.getvalue(), ""


def _sample(picture: Picture, image: bytes, image_format: str) -> Sample:
    return Sample(
        id=picture.id,
        image=image,
        extension=image_format,
        captions=dict(picture.concept.captions),
        family=picture.family,
        concept=picture.concept.id,
        base_concept=picture.concept.base,
        licence=picture.licence,
        source=f"npm:{ICONS.name}@{ICONS.version}",
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _fraction(text: str) -> float:
    return int(_hash(text)[:15], 16) / 16**15


def caption_corpus(pictures: list[Picture]) -> Iterator[str]:
    """The text that the tokenizer learns from: names, keywords and style phrases of the training pictures, in order."""
    concepts = {p.concept.id: p.concept for p in pictures if split_of(p.concept, p.family) == "train"}
    for concept_id in sorted(concepts):
        for language in LANGUAGES:
            caption = concepts[concept_id].captions[language]
            yield caption.name
            yield ", ".join(caption.keywords)
    for language in LANGUAGES:
        for family in FAMILIES:
            # as often as a common word, so that a style costs a piece or two
            yield from [with_style("", family, language)] * 20
