"""`generate`, `replay` and `info`. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from data.options import help_of
from mmwudao.cli.options import (
    Adapter,
    DrawingModelOptions,
    Dtype,
    Json,
    Judge,
    Out,
    Sampling,
    Seed,
    Style,
    as_typed,
    option_groups,
)
from mmwudao.cli.output import check_png, drawing_progress, output_folder, print_pictures
from mmwudao.loading.options import Selection


@option_groups
def generate(
    *,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Also draw each line of this UTF-8 text file ('-' reads stdin).")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Draw this many pictures of each prompt, 1 to 1000 in all.")] = 1,
    like: Annotated[
        Path | None,
        typer.Option(help="Draw what this picture shows, with a model that was trained to; a prompt may be left out."),
    ] = None,
    style: Style = None,
    seed: Seed = None,
    sampling: Sampling,
    candidates: Annotated[
        int | None,
        typer.Option(
            help="Draw this many pictures of each prompt, and keep the n that show it best; 0 draws n. Default: the "
            "model's own number for each picture."
        ),
    ] = None,
    rerank: Annotated[
        Judge | None, typer.Option(help=f"{help_of(Selection, 'judge')} Default: the model's own choice.")
    ] = None,
    model: DrawingModelOptions,
    out: Out = Path("mmwudao-out"),
    preview: Annotated[bool, typer.Option("--preview", help="Keep a preview.png up to date while drawing.")] = False,
    as_json: Json = False,
) -> None:
    """Draw pictures: one PNG each, which `replay` can draw again, and a sheet of all, grid.png.

    Options that are not given are the model's own defaults. Existing files are never overwritten.
    """
    wanted = [*map(as_typed, prompts or []), *(_read_prompts(prompts_file) if prompts_file else [])]
    if not wanted:
        if like is None:
            raise ValueError("no prompt: say what to draw, or give --prompts-file")
        wanted = [""]
    columns = n if len(wanted) > 1 else None
    with output_folder(out):
        from mmwudao.pictures import unused_path, write_pictures_and_sheet
        from mmwudao.tasks import read_pictures

        shown = read_pictures([like])[0] if like is not None else None
        pipeline = model.load()
        with drawing_progress(unused_path(out, "preview") if preview else None, columns) as on_progress:
            images = pipeline.generate(
                wanted,
                n,
                seed,
                style,
                sampling,
                like=shown,
                candidates=candidates,
                rerank=rerank,
                on_progress=on_progress,
            )
        pictures, sheet = write_pictures_and_sheet(out, images, columns)
    print_pictures(pictures, sheet, images, as_json)


def replay(
    picture: Annotated[Path, typer.Argument(help="A PNG that `generate` wrote.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write this file instead of PICTURE-replay.png beside PICTURE.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Load the model from here instead of from where it was.")] = None,
    adapter: Adapter = None,
    device: Annotated[str | None, typer.Option(help="Run on this device instead of the recorded one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Compute in this format instead of the recorded one.")] = None,
    as_json: Json = False,
) -> None:
    """Draw a picture again from the recipe inside it, and compare the two pixel by pixel.

    Exit code 1 when they differ, as they may on other hardware or with another PyTorch.
    """
    from data.atomic import write_files
    from mmwudao.pictures import differing_pixels, encode_png, read_recipe, unused_path

    recipe = read_recipe(picture)
    target = out or unused_path(picture.parent, f"{picture.stem}-replay")
    check_png(target)
    if out is not None and out.exists():
        raise ValueError(f"{out} exists: choose another file")
    with output_folder(target.parent):
        pipeline = DrawingModelOptions(
            model=model or recipe["model"],
            device=device or recipe["device"],
            dtype=dtype or recipe["dtype"],
            adapter=adapter,
            engine=recipe.get("engine", "auto"),
        ).load()
        with drawing_progress() as on_progress:
            image = pipeline.redraw(recipe, on_progress)
        differing = differing_pixels(picture, image)
        write_files({target: encode_png(image)})
    total = image.width * image.height
    if as_json:
        print(json.dumps({"path": str(target), "differing_pixels": differing, "pixels": total}, ensure_ascii=False))
    else:
        print(target)
        verdict = "identical to the original" if not differing else f"differs in {differing} of {total} pixels"
        print(f"{verdict} ({pipeline.device.type}, {pipeline.dtype})")
    if differing:
        raise typer.Exit(1)


def info(
    model: Annotated[
        str, typer.Argument(help="A shipped name, a model directory, a hub id, or a preset such as cogview-4b.")
    ] = "emoji",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Print a model's parts with their sizes and hashes, its styles and defaults, and the memory that drawing takes."""
    from mmwudao.loading.info import describe_model

    description = describe_model(model, dtype)
    print(json.dumps(description, ensure_ascii=False) if as_json else _format_description(description))


def _format_description(description: dict[str, Any]) -> str:
    if "parts" not in description:
        size, count = description["image_size"], description["parameters"]
        first = f"{description['name']}: {size} x {size} pixels, {count:,} parameters (a preset, no weights here)"
        return "\n".join([first, *_format_memory(description["memory"])])
    sampling = ", ".join(f"{name} {value}" for name, value in description["default_sampling"].items())
    lines = [
        f"{description['name']}: {description['image_size']} x {description['image_size']} pixels, "
        f"{description['bytes'] / 1e6:.1f} MB in {description['folder']}",
        f"hash       {description['model_hash']}",
        f"styles     {', '.join(description['styles'])}",
        f"languages  {', '.join(description['languages'])}",
        f"sampling   {sampling}",
    ]
    for name, part in description["parts"].items():
        count = f"{part['parameters']:,} parameters" if "parameters" in part else f"{part['pieces']:,} pieces"
        lines.append(f"{name:<10} {count}, {part['bytes'] / 1e6:.1f} MB, {part['dtype']}, {part['hash']}")
    return "\n".join([*lines, *_format_memory(description["memory"])])


def _format_memory(memory: dict[str, dict[str, Any]]) -> list[str]:
    """A line a device: what drawing takes on top of PyTorch itself."""
    lines = []
    for device, plan in memory.items():
        gb = {name: f"{value / 1e9:.2f}" for name, value in plan.items() if isinstance(value, int)}
        encoder = f"encoder of prompts {gb['encoder']} + " if plan["encoder"] else ""
        lines.append(
            f"memory     {device}, {plan['dtype']}: {gb['total']} GB = transformer {gb['transformer']} + image "
            f"tokenizer {gb['tokenizer']} + {encoder}cache of {plan['rows']} rows {gb['cache']} + "
            f"matrices {gb['matrices']} + noise {gb['noise']} + "
            f"activations {gb['activations']}; decoding a picture {gb['picture']}"
        )
    return lines


def _read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank. Raises `ValueError` for a file that is no UTF-8 text."""
    from data.characters import decode_text

    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        lines = decode_text(data).splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts
