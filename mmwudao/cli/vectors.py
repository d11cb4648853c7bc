"""`embed` and `export onnx`: vectors and towers for other programs. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mmwudao.cli.options import Device, Json, field_option
from mmwudao.loading.options import VectorMaker
from retrieval.vectors.settings import EmbedSettings, RaySettings

export_app = typer.Typer(help="Export parts of a model to the formats of other programs.", no_args_is_help=True)

TowersModel = Annotated[str, typer.Option(help="Use this shipped model, model directory, or folder of towers.")]
By = Annotated[
    VectorMaker,
    typer.Option(help="Take the vectors of the model's towers, or of its generator, if that learned to match."),
]
TowersDtype = Annotated[str, typer.Option(help="Run the towers in float32, bfloat16 or float16.")]


@export_app.callback()
def _group() -> None:
    """Export parts of a model to the formats of other programs."""  # else its one command would be the group


def embed_command(
    shards: Annotated[list[str], typer.Argument(help="A folder of shards, tar files, or a brace pattern.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Write the Parquet files, one a shard, to this folder.")],
    model: TowersModel = "emoji",
    by: By = "towers",
    images: Annotated[bool, typer.Option("--images", help="Embed pictures only; by default both.")] = False,
    texts: Annotated[bool, typer.Option("--texts", help="Embed captions only; by default both.")] = False,
    split: Annotated[str | None, field_option(EmbedSettings, "split")] = EmbedSettings.split,
    vectors: Annotated[str, field_option(EmbedSettings, "dtype")] = EmbedSettings.dtype,
    batch_size: Annotated[int, field_option(EmbedSettings, "batch_size")] = EmbedSettings.batch_size,
    workers: Annotated[int | None, field_option(EmbedSettings, "workers")] = EmbedSettings.workers,
    device: Device = "auto",
    dtype: TowersDtype = "float32",
    ray: Annotated[str | None, field_option(RaySettings, "address", metavar="ADDRESS")] = None,
    replicas: Annotated[int | None, field_option(RaySettings, "replicas")] = None,
    as_json: Json = False,
) -> None:
    """Embed pictures and captions: write their vectors and metadata as Parquet.

    Run an interrupted command again to continue it: complete files are kept. skipped.log names skipped samples.
    """
    from mmwudao.loading.vectors import load_vector_maker
    from retrieval.vectors.embed import embed_shards

    settings = EmbedSettings(split, images or not texts, texts or not images, vectors, batch_size, workers)
    progress = sys.stderr.isatty()
    if ray is None:
        if replicas is not None:
            raise ValueError("--replicas is for --ray: this process has one copy of the towers")
        towers = load_vector_maker(by, model, device, dtype)
        report = embed_shards(towers, shards, out, settings, progress=progress)
    else:
        from retrieval.vectors.embed_ray import embed_shards_on_cluster

        cluster = RaySettings(ray, replicas, device)
        towers = load_vector_maker(by, model, "cpu", dtype)  # the actors move their copies
        report = embed_shards_on_cluster(towers, shards, out, cluster, settings, progress=progress)
    if as_json:
        print(json.dumps({"out": str(out), **asdict(report)}, ensure_ascii=False))
        return
    earlier = f"{report.found} from an earlier run"
    print(f"{report.images} pictures and {report.texts} captions in {report.parts} files ({earlier})")
    print(f"skipped: {sum(report.skipped.values())}")
    print(out)


@export_app.command()
def onnx(
    model: Annotated[str, typer.Argument(help="A shipped name, a model directory, or a folder of towers.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Write the ONNX files to this new folder.")],
    int8: Annotated[bool, typer.Option("--int8", help="Also write versions with 8-bit weights.")] = False,
    as_json: Json = False,
) -> None:
    """Export both towers to ONNX for any batch size, and compare them with PyTorch in onnxruntime."""
    from mmwudao.loading.towers import load_model_towers
    from retrieval.vectors.onnx_export import export_onnx

    report = export_onnx(load_model_towers(model, "cpu"), out, int8=int8)
    if as_json:
        print(json.dumps({"out": str(out), "files": [asdict(entry) for entry in report]}, ensure_ascii=False))
        return
    for entry in report:
        print(
            f"{out / entry.file}  {entry.bytes / 1e6:.1f} MB, largest difference {entry.difference:.1e}, "
            f"cosine {entry.cosine:.4f} (least {entry.least_cosine:.4f})"
        )
