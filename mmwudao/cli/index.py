"""`index`: build, change and check collections. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmwudao.cli.options import Device, Json, as_typed, option_groups
from mmwudao.cli.photos import Maker, PhotoOptions, is_photo_folder, update_photos
from mmwudao.cli.vectors import By, TowersDtype, TowersModel

if TYPE_CHECKING:
    from retrieval.towers.base import Towers

app = typer.Typer(help="Build, change and check collections of vectors.", no_args_is_help=True)

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="VECTORS|SHARDS...",
        help="A folder that `embed` wrote, or shards to embed first (a folder, tar files, a brace pattern).",
    ),
]
BuildSources = Annotated[
    list[str],
    typer.Argument(
        metavar="FOLDER|VECTORS|SHARDS...",
        help="A folder of pictures, one that `embed` wrote, or shards (a folder, tar files, a brace pattern).",
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
@option_groups
def build(
    sources: BuildSources,
    *,
    collection: Annotated[
        str | None,
        typer.Option(
            help="A folder, s3://bucket/prefix, or http://host:port/name (Milvus). Pictures have a place by default."
        ),
    ] = None,
    kind: Kinds = "image",
    photos: PhotoOptions,
    model: TowersModel = "emoji",
    by: By = "towers",
    durable: Durable = False,
    device: Device = "auto",
    dtype: TowersDtype = "float32",
    as_json: Json = False,
) -> None:
    """Build a collection: of a folder of pictures, which it then follows, or of vectors or shards.

    FOLDER: run it again to add what is new or changed and to drop what is gone, or to continue an interrupted run.
    Shards: to finish an interrupted build, run `add --replace` and `optimise`.
    """
    from retrieval.collections.building import build_collection, check_unfilled, open_source
    from retrieval.collections.opening import CollectionError

    progress, maker = sys.stderr.isatty(), Maker(model, by)

    def load_towers() -> Towers:
        return maker.load(device, dtype)

    if is_photo_folder(sources):
        if kind != "image":
            raise CollectionError("a folder of pictures has no captions: --kind is image")
        update_photos(Path(sources[0]), collection, photos, load_towers, maker, as_json=as_json)
        return
    if collection is None:
        missing = next((source for source in sources if "{" not in source and not Path(source).exists()), None)
        if missing is not None:
            raise CollectionError(f"no folder of pictures or shards at {missing}")
        raise CollectionError("say where to build it: --collection FOLDER")
    check_unfilled(collection)  # before hours of encoding, not after
    with open_source(sources, load_towers, kind, progress=progress) as vectors:
        count = build_collection(vectors, collection, kind, durable=durable, progress=progress)
    _tell(as_json, f"{count} items in {collection}", collection=collection, added=count)


@app.command()
def add(
    sources: Sources,
    collection: Place,
    kind: Kinds = "image",
    replace: Annotated[bool, typer.Option("--replace", help="Replace items that have the same ids.")] = False,
    model: TowersModel = "emoji",
    by: By = "towers",
    durable: Durable = False,
    device: Device = "auto",
    dtype: TowersDtype = "float32",
    as_json: Json = False,
) -> None:
    """Add items to a collection. Searches see them at once; `optimise` makes searches fast again."""
    from retrieval.collections.building import add_vectors, open_source
    from retrieval.collections.opening import open_collection

    progress = sys.stderr.isatty()
    open_collection(collection, durable=durable).close()  # before hours of encoding, not after
    with (
        open_source(sources, lambda: Maker(model, by).load(device, dtype), kind, progress=progress) as vectors,
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
        wanted += _read_ids(ids_file)
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
    queries: Annotated[int, typer.Option(help="Search for neighbours of this many stored items, at least 1.")] = 100,
    k: Annotated[int, typer.Option("-k", help="Look for this many neighbours of each, 1 to 10000.")] = 10,
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


def _read_ids(path: Path) -> list[str]:
    """The lines of a file that are not empty. Raises `ValueError` for a file that is no text."""
    from data.characters import decode_text

    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        # at line feeds alone: other ends of lines that Unicode knows may stand in an id
        lines = decode_text(data).replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    return [line for line in lines if line]


def _tell(as_json: bool, text: str, **record: object) -> None:
    print(json.dumps(record, ensure_ascii=False) if as_json else text)
