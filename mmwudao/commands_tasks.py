"""`upscale`: larger pictures. Heavy imports happen inside the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmwudao.commands_describe import Pictures
from mmwudao.commands_draw import Device, Dtype, Json, Model, as_typed, choose_threads, output_folder


def upscale(
    images: Pictures,
    prompt: Annotated[str | None, typer.Option(help="What they show; CogView's models read it.")] = None,
    seed: Annotated[int | None, typer.Option(help="CogView draws picture k with seed + k; default: a new one.")] = None,
    model: Model = "emoji",
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder for the pictures.")] = Path("mmwudao-out"),
    as_json: Json = False,
) -> None:
    """Enlarge pictures: to twice their size, or to 512 px with an imported CogView super-resolution model."""
    with output_folder(out):
        choose_threads()
        from mmwudao.pictures import encode_png, unused_path, write_files
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
