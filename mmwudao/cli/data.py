"""`data build emoji`, `data pack`, `data stats`: from pictures to shards. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from data.shards import Manifest

app = typer.Typer(help="Build, pack and count shards of pictures with their captions.", no_args_is_help=True)
build_app = typer.Typer(help="Build one of the data sets that the project has a recipe for.", no_args_is_help=True)
app.add_typer(build_app, name="build")

SamplesPerShard = Annotated[int, typer.Option(help="Samples in one tar file.")]


@build_app.command()
def emoji(
    out: Annotated[Path, typer.Option("-o", "--out", help="The new folder for the shards.")],
    size: Annotated[int | None, typer.Option(help="Pixels a side; default: the shipped model's.")] = None,
    image_format: Annotated[str, typer.Option("--format", help="webp (lossless) or png.")] = "webp",
    samples_per_shard: SamplesPerShard = 2000,
    limit: Annotated[int | None, typer.Option(help="Only that many pictures, chosen by hash.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where the fetched packages are kept.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that render; default: one a core.")] = None,
    families: Annotated[str | None, typer.Option(help="As in noto,twemoji; default: all ten.")] = None,
) -> None:
    """The emoji set: ten families, named in seven languages. Needs the npm client; two builds are identical."""
    from data.recipes.emoji import DEFAULT_SIZE, FAMILIES, EmojiSettings, build_emoji

    settings = EmojiSettings(
        size=DEFAULT_SIZE if size is None else size,
        image_format=image_format,
        samples_per_shard=samples_per_shard,
        families=tuple(families.split(",")) if families else FAMILIES,
        limit=limit,
        cache=cache,
        workers=workers,
    )
    _print_manifest(out, build_emoji(out, settings, progress=sys.stderr.isatty()))


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="A folder of pictures and .txt or .json, a CSV or a JSONL.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The new folder for the shards.")],
    size: Annotated[int | None, typer.Option(help="Crop to a square of that many pixels; default: keep.")] = None,
    language: Annotated[str, typer.Option(help="The language of the captions: zh, en, ...; und: unknown.")] = "und",
    samples_per_shard: SamplesPerShard = 2000,
    max_pixels: Annotated[int | None, typer.Option(help="Skip pictures of more pixels than that.")] = None,
    test_fraction: Annotated[float, typer.Option(help="That part of the samples becomes a test split.")] = 0.0,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad sample; do not skip it.")] = False,
) -> None:
    """Shards from your own pictures and captions. What is skipped is counted, and named in skipped.log."""
    from data.images import MAX_PIXELS
    from data.pack import PackSettings, pack_samples

    settings = PackSettings(
        image_size=size,
        language=language,
        samples_per_shard=samples_per_shard,
        max_pixels=MAX_PIXELS if max_pixels is None else max_pixels,
        strict=strict,
        test_fraction=test_fraction,
    )
    _print_manifest(out, pack_samples(source, out, settings, progress=sys.stderr.isatty()))


@app.command()
def stats(
    shards: Annotated[list[str], typer.Argument(help="A folder of shards, tar files, or a brace pattern.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Count what shards hold: samples, languages, families, sizes, duplicates."""
    from data.stats import format_stats, shard_stats

    counted = shard_stats(shards)
    print(json.dumps(asdict(counted), ensure_ascii=False) if as_json else format_stats(counted))


def _print_manifest(out: Path, manifest: Manifest) -> None:
    for split, shards in manifest.splits.items():
        print(f"{split}: {manifest.samples(split)} samples in {len(shards)} shards")
    print(f"skipped: {sum(manifest.skipped.values())}")
    for reason, count in sorted(manifest.skipped.items(), key=lambda entry: -entry[1])[:20]:
        print(f"  {count} {reason}")
    print(out)
