"""SVG pictures to shards: rendered by resvg in several processes, written in the order of their hashes."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data.batches import cores
from data.recipes.settings import RecipeSettings
from data.recipes.splits import stable_hash
from data.sample import Caption, Sample
from data.shards import ShardInfo, ShardWriter


@dataclass(frozen=True)
class Picture:
    """An SVG document to render, what it shows, and the split that it belongs to."""

    id: str
    svg: str
    captions: Mapping[str, Caption]
    family: str
    concept: str
    base_concept: str
    split: str
    licence: str
    source: str


def write_rendered(
    folder: Path,
    pictures: Iterable[Picture],
    settings: RecipeSettings,
    splits: Iterable[str],
    skipped: Counter[str],
    progress: bool = True,
) -> dict[str, list[ShardInfo]]:
    """Render the pictures and write the shards of each split; what fails is counted in `skipped`.

    Each split is in the order of its pictures' hashes, and `settings.limit` keeps the first of all.
    """
    pictures = sorted(pictures, key=lambda picture: stable_hash(picture.id))[: settings.limit]
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(folder, split, settings.samples_per_shard)) for split in splits
        }
        pool = stack.enter_context(ProcessPoolExecutor(settings.workers or cores()))
        jobs = ((picture.svg, settings.size, settings.format) for picture in pictures)
        rendered = pool.map(_render, *zip(*jobs, strict=True), chunksize=16) if pictures else iter(())
        bar = tqdm(zip(pictures, rendered, strict=True), "rendering", len(pictures), disable=not progress)
        for picture, (image, problem) in bar:
            if image is None:
                skipped[f"render failed: {picture.id}: {problem}"] += 1
            else:
                writers[picture.split].write(_sample(picture, image, settings.format))
    return {split: writer.shards for split, writer in writers.items()}


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
        captions=dict(picture.captions),
        family=picture.family,
        concept=picture.concept,
        base_concept=picture.base_concept,
        licence=picture.licence,
        source=picture.source,
    )
