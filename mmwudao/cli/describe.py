"""`caption`, `ask`, `rerank`, `complete` and `upscale`. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from mmwudao.cli.options import (
    DrawingModelOptions,
    Json,
    Judge,
    ModelOptions,
    Out,
    Sampling,
    Seed,
    Style,
    as_typed,
    option_groups,
)
from mmwudao.cli.output import drawing_progress, output_folder, print_pictures

Writer = Literal["auto", "generator", "both"]  # as in `mmwudao.tasks`, which imports PyTorch
Pictures = Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files.")]


@option_groups
def caption(
    *,
    images: Pictures,
    language: Annotated[
        str | None,
        typer.Option(help="Describe in this language, in several (zh,en) or in all; default: the model's first."),
    ] = None,
    by: Annotated[
        Writer,
        typer.Option(
            help="The generator writes alone, or both work together: the model's towers judge what it writes; auto is "
            "both where the model has towers."
        ),
    ] = "auto",
    model: ModelOptions,
    as_json: Json = False,
) -> None:
    """Say what pictures show: the best description found, one line for each picture and language."""
    from mmwudao.tasks import read_pictures

    pictures = read_pictures(images)
    pipeline = model.load()
    known = list(pipeline.config.languages) or [""]  # "": a model with one language may not name it
    languages = known if language == "all" else (language or "").split(",")
    told = {one or known[0]: pipeline.caption(pictures, one or None, by) for one in languages}
    for k, path in enumerate(images):
        for one, captions in told.items():
            if as_json:
                print(json.dumps({"path": str(path), "language": one, "caption": captions[k]}, ensure_ascii=False))
            else:
                print(f"{path}  {f'{one}: ' if len(told) > 1 else ''}{captions[k]}")


@option_groups
def ask(
    *,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture file; its centre square is used.")],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...", help="What to ask about the picture.")],
    language: Annotated[
        str | None, typer.Option(help="The questions are in this language; by default it is guessed from each.")
    ] = None,
    among: Annotated[str | None, typer.Option(help="Choose the answers among these, as in yes,no.")] = None,
    model: ModelOptions,
    as_json: Json = False,
) -> None:
    """Answer questions about a picture, one line for each; with --json, how likely the answer is to the model too."""
    from mmwudao.tasks import read_pictures

    (picture,) = read_pictures([image])
    asked = [as_typed(question) for question in questions]
    answers = model.load().ask(picture, asked, language, [] if among is None else among.split(","))
    for question, one in zip(questions, answers, strict=True):
        record = {"question": question, "answer": one.text, "language": one.language, "probability": one.probability}
        print(json.dumps(record, ensure_ascii=False) if as_json else one.text)


@option_groups
def rerank(
    *,
    prompt: Annotated[str, typer.Argument(help="What the pictures should show.")],
    images: Pictures,
    by: Annotated[
        Judge, typer.Option(help="The pictures are judged by their captions, by the model's towers, or by both.")
    ] = "caption",
    model: ModelOptions,
    as_json: Json = False,
) -> None:
    """Sort pictures by how well they show the prompt: its log probability as their caption, or by towers."""
    from mmwudao.tasks import read_pictures

    pictures = read_pictures(images)
    scores = model.load().rerank(as_typed(prompt), pictures, by)
    for score, path in sorted(zip(scores, images, strict=True), key=lambda pair: -pair[0]):
        print(json.dumps({"path": str(path), "score": score}) if as_json else f"{score:9.3f}  {path}")


@option_groups
def complete(
    *,
    image: Annotated[Path, typer.Argument(help="A picture; its centre square is used.")],
    prompt: Annotated[str, typer.Option(help="The prompt says what the whole picture shows.")],
    keep: Annotated[str, typer.Option(help="Keep this part: top:0.5, left:0.5, or as --mask.")] = "top:0.5",
    mask: Annotated[
        Path | None,
        typer.Option(
            help="Keep what is white in this picture, and draw what is black or transparent; of any form where the "
            "model was trained to fill holes, else the top or the left."
        ),
    ] = None,
    extend: Annotated[
        str | None,
        typer.Option(help="Keep all, and draw as much as this share of it at one side: left:0.25, right, top, bottom."),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Draw the rest this many times, 1 to 1000.")] = 1,
    style: Style = None,
    seed: Seed = None,
    sampling: Sampling,
    model: DrawingModelOptions,
    out: Out = Path("mmwudao-out"),
    as_json: Json = False,
) -> None:
    """Keep part of a picture and draw the rest, or what lies beyond a side of it, by a prompt.

    What is kept stays as it is, pixel by pixel, but for a seam of three pixels.
    """
    if (keep != "top:0.5") + (mask is not None) + (extend is not None) > 1:
        raise ValueError("give one of --keep, --mask and --extend")
    with output_folder(out):
        from mmwudao.pictures import write_pictures_and_sheet
        from mmwudao.tasks import read_pictures

        (picture,) = read_pictures([image])
        pipeline = model.load()
        with drawing_progress() as on_progress:
            images = pipeline.complete(
                picture,
                as_typed(prompt),
                keep if mask is None else mask,
                n,
                seed,
                style,
                sampling,
                extend=extend,
                on_progress=on_progress,
            )
        pictures, sheet = write_pictures_and_sheet(out, images)
    print_pictures(pictures, sheet, images, as_json)


@option_groups
def upscale(
    *,
    images: Pictures,
    prompt: Annotated[
        str | None, typer.Option(help="The prompt says what the pictures show; only CogView's models read it.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="CogView draws picture k with this seed + k; without it the seed is random.")
    ] = None,
    model: ModelOptions,
    out: Out = Path("mmwudao-out"),
    as_json: Json = False,
) -> None:
    """Enlarge pictures, transparency too: to twice their size, or to 512 px with an imported CogView model."""
    with output_folder(out):
        from mmwudao.pictures import write_pictures
        from mmwudao.tasks import read_pictures
        from mmwudao.upscaling import check_sizes

        pictures = read_pictures(images, alpha=True)
        check_sizes(dict(zip(images, pictures, strict=True)))
        larger = model.load().upscale(pictures, None if prompt is None else as_typed(prompt), seed)
        paths = write_pictures(out, larger, [f"{path.stem}-upscaled" for path in images])
    for path, image in zip(paths, larger, strict=True):
        record = {"path": str(path), "width": image.width, "height": image.height, **image.info}
        print(json.dumps(record, ensure_ascii=False) if as_json else f"{path}  {image.width}x{image.height}")
