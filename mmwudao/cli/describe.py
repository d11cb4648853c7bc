"""`caption`, `rerank`, `complete`, `upscale`: what a model makes of pictures. Heavy imports are inside the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from mmwudao.cli.draw import (
    Device,
    Dtype,
    Guidance,
    Json,
    Judge,
    Model,
    Out,
    Seed,
    Style,
    Temperature,
    TopK,
    TopP,
    Window,
    as_typed,
    choose_threads,
    drawing_progress,
    output_folder,
    print_pictures,
    write_pictures,
)

Writer = Literal["auto", "generator", "both"]  # as in `mmwudao.tasks`, which is not imported for --help
Pictures = Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files.")]


def caption(
    images: Pictures,
    language: Annotated[
        str | None,
        typer.Option(help="One of the model's languages, several as in zh,en, or all; default: its first."),
    ] = None,
    by: Annotated[
        Writer, typer.Option(help="The generator alone, or both: the model's towers judge what it writes.")
    ] = "auto",
    model: Model = "emoji",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Say what pictures show: the best description found, one line a picture (and language)."""
    choose_threads()
    from mmwudao.pipeline import load
    from mmwudao.tasks import read_pictures

    pictures = read_pictures(images)
    pipeline = load(model, device, dtype)
    languages = list(pipeline.config.languages) if language == "all" else (language or "").split(",")
    told = {one or pipeline.config.languages[0]: pipeline.caption(pictures, one or None, by) for one in languages}
    for k, path in enumerate(images):
        for one, captions in told.items():
            if as_json:
                print(json.dumps({"path": str(path), "language": one, "caption": captions[k]}, ensure_ascii=False))
            else:
                print(f"{path}  {f'{one}: ' if len(told) > 1 else ''}{captions[k]}")


def rerank(
    prompt: Annotated[str, typer.Argument(help="What the pictures should show.")],
    images: Pictures,
    by: Annotated[Judge, typer.Option(help="What judges.")] = "caption",
    model: Model = "emoji",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Sort pictures by how well they show the prompt: its log probability as their caption, or by towers."""
    choose_threads()
    from mmwudao.pipeline import load
    from mmwudao.tasks import read_pictures

    pictures = read_pictures(images)
    scores = load(model, device, dtype).rerank(as_typed(prompt), pictures, by)
    for score, path in sorted(zip(scores, images, strict=True), key=lambda pair: -pair[0]):
        print(json.dumps({"path": str(path), "score": score}) if as_json else f"{score:9.3f}  {path}")


def complete(
    image: Annotated[Path, typer.Argument(help="A picture; its centre square is used.")],
    prompt: Annotated[str, typer.Option(help="What the whole picture shows.")],
    keep: Annotated[
        str, typer.Option(help="What stays: top:0.5, left:0.5, or a mask picture whose white part stays.")
    ] = "top:0.5",
    n: Annotated[int, typer.Option("-n", help="How many times the rest is drawn.")] = 1,
    style: Style = None,
    seed: Seed = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    guidance: Guidance = None,
    window: Window = None,
    model: Model = "emoji",
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = Path("mmwudao-out"),
    as_json: Json = False,
) -> None:
    """Keep the top or the left part of a picture and draw the rest, by a prompt."""
    with output_folder(out):
        choose_threads()
        from mmwudao.pipeline import load
        from mmwudao.tasks import read_pictures

        (picture,) = read_pictures([image])
        pipeline = load(model, device, dtype)
        with drawing_progress(None, None) as on_progress:
            sampling = (temperature, top_k, top_p, guidance, window)
            images = pipeline.complete(picture, as_typed(prompt), keep, n, seed, style, *sampling, on_progress)
        pictures, sheet = write_pictures(out, images, None)
    print_pictures(pictures, sheet, images, as_json)


def upscale(
    images: Pictures,
    prompt: Annotated[str | None, typer.Option(help="What they show; CogView's models read it.")] = None,
    seed: Annotated[int | None, typer.Option(help="CogView draws picture k with seed + k; default: a new one.")] = None,
    model: Model = "emoji",
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = Path("mmwudao-out"),
    as_json: Json = False,
) -> None:
    """Enlarge pictures: to twice their size, or to 512 px with an imported CogView super-resolution model."""
    with output_folder(out):
        choose_threads()
        from data.atomic import write_files
        from mmwudao.pictures import encode_png, unused_path
        from mmwudao.pipeline import load
        from mmwudao.tasks import read_pictures
        from mmwudao.upscaling import check_size

        pictures = read_pictures(images)
        for path, picture in zip(images, pictures, strict=True):
            try:
                check_size(picture)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        pipeline = load(model, device, dtype)
        larger = pipeline.upscale(pictures, None if prompt is None else as_typed(prompt), seed)
        files: dict[Path, bytes] = {}
        for path, image in zip(images, larger, strict=True):
            files[unused_path(out, f"{path.stem}-upscaled", taken=frozenset(files))] = encode_png(image)
        write_files(files)
    for path, image in zip(files, larger, strict=True):
        record = {"path": str(path), "width": image.width, "height": image.height, **image.info}
        print(json.dumps(record, ensure_ascii=False) if as_json else f"{path}  {image.width}x{image.height}")
