"""`embed` and `export onnx`: what the towers give to other programs. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mmwudao.cli.options import Device, Json

export_app = typer.Typer(help="Write parts of a model in the formats of other programs.", no_args_is_help=True)

TowersModel = Annotated[str, typer.Option(help="A shipped name, a model directory, or a folder of towers.")]
TowersDtype = Annotated[str, typer.Option(help="What the towers compute in: float32, bfloat16 or float16.")]


@export_app.callback()
def _group() -> None:
    """Write parts of a model in the formats of other programs."""  # else a single command would be the group


def embed(
    shards: Annotated[list[str], typer.Argument(help="A folder of shards, tar files, or a brace pattern.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder for the Parquet files, one a shard.")],
    model: TowersModel = "emoji",
    images: Annotated[bool, typer.Option("--images", help="Pictures only ...")] = False,
    texts: Annotated[bool, typer.Option("--texts", help="... or captions only; default: both.")] = False,
    split: Annotated[str | None, typer.Option(help="Only that split; default: all.")] = None,
    vectors: Annotated[str, typer.Option(help="How vectors are stored: float32 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(help="Pictures in one pass of the towers.")] = 64,
    workers: Annotated[int | None, typer.Option(help="Batches in work at a time; default: one a core.")] = None,
    device: Device = "auto",
    dtype: TowersDtype = "float32",
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Work on a Ray cluster: auto, HOST:PORT, or local.")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(help="With --ray: copies of the towers; default: one a GPU, or one a core.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Vectors of pictures and captions, with what is known of each, as Parquet.

    A run that was stopped goes on when it is started again: whole files stay. What is skipped is named in skipped.log.
    """
    from mmwudao.loading.towers import load_model_towers
    from retrieval.vectors.embed import embed_shards

    options: dict[str, Any] = {
        "split": split,
        "images": images or not texts,
        "texts": texts or not images,
        "dtype": vectors,
        "batch_size": batch_size,
        "workers": workers,
        "progress": sys.stderr.isatty(),
    }
    if ray is None:
        if replicas is not None:
            raise ValueError("--replicas is for --ray: this process has one copy of the towers")
        report = embed_shards(load_model_towers(model, device, dtype), shards, out, **options)
    else:
        from retrieval.vectors.embed_ray import embed_shards_on_cluster

        towers = load_model_towers(model, "cpu", dtype)  # the actors move their copies
        report = embed_shards_on_cluster(towers, shards, out, ray, replicas=replicas, device=device, **options)
    if as_json:
        print(json.dumps({"out": str(out), **asdict(report)}, ensure_ascii=False))
        return
    print(f"{report.images} pictures and {report.texts} captions in {report.parts} files ({report.found} from before)")
    print(f"skipped: {sum(report.skipped.values())}")
    print(out)


@export_app.command()
def onnx(
    model: Annotated[str, typer.Argument(help="A shipped name, a model directory, or a folder of towers.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The new folder for the ONNX files.")],
    int8: Annotated[bool, typer.Option("--int8", help="Also with weights of 8 bits.")] = False,
    as_json: Json = False,
) -> None:
    """Both towers as ONNX, with any batch size, compared with PyTorch in onnxruntime."""
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
