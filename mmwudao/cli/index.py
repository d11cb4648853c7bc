"""`index` and `search`: build, change and search collections. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmwudao.cli.options import Device, Json, as_typed
from mmwudao.cli.vectors import TowersDtype, TowersModel

if TYPE_CHECKING:
    from PIL import Image

    from retrieval.collections.opening import Hit

SHEET_PIXELS = 128  # the side of each picture on the sheet of `search`

app = typer.Typer(help="Build, change and check collections of vectors.", no_args_is_help=True)

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="VECTORS|SHARDS...",
        help="A folder that `embed` wrote, or shards to embed first (a folder, tar files, a brace pattern).",
    ),
]
Place = Annotated[
    str, typer.Option("--collection", help="A folder, s3://bucket/prefix, or http://host:port/name (Milvus).")
]
Kinds = Annotated[str, typer.Option(help="Store the pictures (image), their captions (text), or both (all).")]
Durable = Annotated[bool, typer.Option("--durable", help="Make every write survive a power failure too (slower).")]
Where = Annotated[
    str | None, typer.Option(help="Consider only items for which this is true: \"family = 'noto' AND year > 2016\".")
]


@app.command()
def build(
    sources: Sources,
    collection: Place,
    kind: Kinds = "image",
    model: TowersModel = "emoji",
    durable: Durable = False,
    device: Device = "auto",
    dtype: TowersDtype = "float32",
    as_json: Json = False,
) -> None:
    """Build a new collection of vectors, with an index if there are many.

    To finish an interrupted build, run `add --replace` and `optimise`.
    """
    from mmwudao.loading.towers import load_model_towers
    from retrieval.collections.building import build_collection, open_source

    progress = sys.stderr.isatty()
    with open_source(sources, lambda: load_model_towers(model, device, dtype), progress=progress) as vectors:
        count = build_collection(vectors, collection, kind, durable=durable, progress=progress)
    _tell(as_json, f"{count} items in {collection}", collection=collection, added=count)


@app.command()
def add(
    sources: Sources,
    collection: Place,
    kind: Kinds = "image",
    replace: Annotated[bool, typer.Option("--replace", help="Replace items that have the same ids.")] = False,
    model: TowersModel = "emoji",
    durable: Durable = False,
    device: Device = "auto",
    dtype: TowersDtype = "float32",
    as_json: Json = False,
) -> None:
    """Add items to a collection. Searches see them at once; `optimise` makes searches fast again."""
    from mmwudao.loading.towers import load_model_towers
    from retrieval.collections.building import add_vectors, open_source
    from retrieval.collections.opening import open_collection

    progress = sys.stderr.isatty()
    with (
        open_source(sources, lambda: load_model_towers(model, device, dtype), progress=progress) as vectors,
        open_collection(collection, dim=vectors.dim, model=vectors.model, durable=durable) as opened,
    ):
        count = add_vectors(opened, vectors, kind, replace=replace, progress=progress)
    _tell(as_json, f"{count} items {'stored' if replace else 'added'}", collection=collection, added=count)


@app.command()
def delete(
    collection: Place,
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID...", help="The ids of the items to remove.")] = None,
    ids_file: Annotated[
        Path | None, typer.Option(help="Read ids from a UTF-8 text file, one a line ('-' reads stdin).")
    ] = None,
    durable: Durable = False,
    as_json: Json = False,
) -> None:
    """Remove items by id."""
    from retrieval.collections.opening import CollectionError, open_collection

    wanted = [as_typed(name) for name in ids or []]
    if ids_file:
        text = sys.stdin.read() if str(ids_file) == "-" else ids_file.read_text(encoding="utf-8")
        wanted += text.splitlines()
    if not wanted:
        raise CollectionError("no id: name the items to delete, or give --ids-file")
    with open_collection(collection, durable=durable) as opened:
        count = opened.delete(wanted)
    _tell(as_json, f"{count} of {len(set(wanted))} items deleted", collection=collection, deleted=count)


@app.command()
def optimise(collection: Place, durable: Durable = False, as_json: Json = False) -> None:
    """Merge small files and update the indexes. Searches go on in the meantime."""
    from retrieval.collections.opening import open_collection

    with open_collection(collection, durable=durable) as opened:
        opened.optimise()
        count = opened.count()
    _tell(as_json, f"{count} items", collection=collection, items=count)


@app.command()
def snapshots(
    collection: Place,
    make: Annotated[str | None, typer.Option(help="Make a snapshot of the present state under a new name.")] = None,
    restore: Annotated[str | None, typer.Option(help="Return to the state of a snapshot, and keep all.")] = None,
    drop: Annotated[str | None, typer.Option(help="Delete a snapshot; `optimise` then frees its space.")] = None,
    durable: Durable = False,
    as_json: Json = False,
) -> None:
    """List the snapshots of a collection, after making, restoring or dropping one if asked."""
    from retrieval.collections.opening import CollectionError, open_collection

    if sum(name is not None for name in (make, restore, drop)) > 1:
        raise CollectionError("give one of --make, --restore and --drop")
    with open_collection(collection, durable=durable) as opened:
        if make is not None:
            opened.snapshot(make)
        elif restore is not None:
            opened.restore(restore)
        elif drop is not None:
            opened.drop_snapshot(drop)
        names = opened.snapshots()
    _tell(as_json, "\n".join(names) or "no snapshots", collection=collection, snapshots=names)


@app.command()
def check(
    collection: Place,
    queries: Annotated[int, typer.Option(help="Search for the neighbours of this many stored items.")] = 100,
    k: Annotated[int, typer.Option("-k", help="Look for this many neighbours of each.")] = 10,
    where: Where = None,
    as_json: Json = False,
) -> None:
    """Measure the recall of searches: the share of the true nearest items that they return."""
    from retrieval.collections.opening import open_collection
    from retrieval.collections.recall import measure_search_recall

    with open_collection(collection) as opened:
        report = measure_search_recall(opened, queries, k, where)
        record = {"model": opened.model, "dim": opened.dim, "snapshots": opened.snapshots()}
    text = (
        f"{report.items} items of dimension {record['dim']}; {report.queries} queries: recall@{k} {report.recall:.4f}"
    )
    _tell(as_json, f"{text} (least {report.least:.2f})", **asdict(report), **record)


def search_command(
    collection: Annotated[str, typer.Argument(help="The collection: a folder, s3://bucket/prefix, or http://host:port/name.")],
    text: Annotated[str | None, typer.Argument(help="The text to search for.")] = None,
    image: Annotated[Path | None, typer.Option(help="Search for this picture file instead of a text.")] = None,
    k: Annotated[int, typer.Option("-k", help="Return this many items.")] = 10,
    where: Where = None,
    sheet: Annotated[Path | None, typer.Option(help="Write the pictures of the results to this PNG file.")] = None,
    shards: Annotated[
        str | None, typer.Option(help="Read the pictures from these shards; by default from where they were embedded.")
    ] = None,
    model: TowersModel = "emoji",
    device: Device = "auto",
    dtype: TowersDtype = "float32",
    as_json: Json = False,
) -> None:
    """Print the items most similar to a text or a picture, best first."""
    from data.atomic import write_files
    from mmwudao.loading.towers import load_model_towers
    from mmwudao.pictures import encode_png, grid
    from retrieval.collections.opening import open_collection
    from retrieval.collections.query import check_towers, embed_query, hit_pictures

    query = _read_query(text, image)
    with open_collection(collection) as opened:
        towers = load_model_towers(model, device, dtype)
        check_towers(opened, collection, towers)
        hits = opened.search(embed_query(towers, query), k, where)
    if sheet:
        write_files({sheet: encode_png(grid(hit_pictures(hits, SHEET_PIXELS, shards)))})
    for hit in hits:
        if as_json:
            print(json.dumps(asdict(hit), ensure_ascii=False))
        else:
            print(f"{hit.score:.4f}  {hit.id}  {_describe(hit)}")


def _read_query(text: str | None, image: Path | None) -> str | Image.Image:
    """The text or the decoded picture to search for. Raises `ValueError` unless exactly one is given and usable."""
    from mmwudao.tasks import read_pictures

    if (text is None) == (image is None):
        raise ValueError("give a text or --image: one of them is what to look for")
    if image is not None:
        return read_pictures([image])[0]
    query = as_typed(text or "")
    if not query.strip():
        raise ValueError("an empty text: say what to look for")
    return query


def _describe(hit: Hit) -> str:
    from retrieval.collections.query import hit_captions

    family = hit.metadata.get("family")
    return " / ".join(hit_captions(hit)) + (f"  ({family})" if family else "")


def _tell(as_json: bool, text: str, **record: object) -> None:
    print(json.dumps(record, ensure_ascii=False) if as_json else text)
