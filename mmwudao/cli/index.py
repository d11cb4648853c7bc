"""`index` and `search`: collections of vectors, made, changed and asked. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mmwudao.cli.options import Device, Json, as_typed
from mmwudao.cli.vectors import TowersDtype, TowersModel

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from retrieval.collections.opening import Collection, Hit
    from retrieval.vectors.parquet import Kind, Vectors

SHEET_PIXELS = 128  # a side of each picture on the sheet of `search`

app = typer.Typer(help="Collections of vectors: build, change and check them.", no_args_is_help=True)

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="VECTORS|SHARDS...",
        help="A folder that `embed` wrote; or shards (a folder, tar files, a brace pattern), embedded on the way.",
    ),
]
Place = Annotated[
    str, typer.Option("--collection", help="A folder, s3://bucket/prefix, or http://host:port/name (Milvus).")
]
Kinds = Annotated[str, typer.Option(help="image: the pictures; text: their captions; all: both.")]
Durable = Annotated[bool, typer.Option("--durable", help="Also survive a loss of power (slower).")]
Where = Annotated[
    str | None, typer.Option(help="Only items of which this is true: \"family = 'noto' AND year > 2016\".")
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
    """A new collection of vectors, with an index if there are many.

    A run that was stopped goes on with `add --replace` and `optimise`.
    """
    from retrieval.collections.opening import CollectionError, open_collection

    with _source(sources, model, device, dtype) as source:
        with open_collection(collection, create=True, dim=source.dim, model=source.model, durable=durable) as opened:
            if opened.count():
                raise CollectionError(f"{collection} holds items: use `mmwudao index add` (--replace to replace them)")
            count = _store(source, kind, opened.add)
            opened.optimise()
    _tell(as_json, f"{count} items in {collection}", collection=collection, added=count)


@app.command()
def add(
    sources: Sources,
    collection: Place,
    kind: Kinds = "image",
    replace: Annotated[bool, typer.Option("--replace", help="Replace items that are there already.")] = False,
    model: TowersModel = "emoji",
    durable: Durable = False,
    device: Device = "auto",
    dtype: TowersDtype = "float32",
    as_json: Json = False,
) -> None:
    """More items for a collection. They are found at once; `optimise` makes searches fast again."""
    from retrieval.collections.opening import open_collection

    with _source(sources, model, device, dtype) as source:
        with open_collection(collection, dim=source.dim, model=source.model, durable=durable) as opened:
            count = _store(source, kind, opened.upsert if replace else opened.add)
    _tell(as_json, f"{count} items {'stored' if replace else 'added'}", collection=collection, added=count)


@app.command()
def delete(
    collection: Place,
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID...", help="Which items.")] = None,
    ids_file: Annotated[Path | None, typer.Option(help="A UTF-8 text file with one id a line ('-': stdin).")] = None,
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
        raise CollectionError("no id: say what to delete, or give --ids-file")
    with open_collection(collection, durable=durable) as opened:
        count = opened.delete(wanted)
    _tell(as_json, f"{count} of {len(set(wanted))} were there and are deleted", collection=collection, deleted=count)


@app.command()
def optimise(collection: Place, durable: Durable = False, as_json: Json = False) -> None:
    """Merge small files and bring the indexes up to date. Searches go on meanwhile."""
    from retrieval.collections.opening import open_collection

    with open_collection(collection, durable=durable) as opened:
        opened.optimise()
        count = opened.count()
    _tell(as_json, f"{count} items", collection=collection, items=count)


@app.command()
def snapshots(
    collection: Place,
    make: Annotated[str | None, typer.Option(help="Remember the collection as it is under a new name ...")] = None,
    restore: Annotated[str | None, typer.Option(help="... or make it what it was (snapshots stay) ...")] = None,
    drop: Annotated[str | None, typer.Option(help="... or forget a snapshot; `optimise` then frees its space.")] = None,
    durable: Durable = False,
    as_json: Json = False,
) -> None:
    """The names of a collection's snapshots; or one is made, restored or dropped first."""
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
    queries: Annotated[int, typer.Option(help="Stored items that are searched for.")] = 100,
    k: Annotated[int, typer.Option("-k", help="How many neighbours of each are looked for.")] = 10,
    where: Where = None,
    as_json: Json = False,
) -> None:
    """How many of the true nearest a search finds, measured against a comparison with every vector."""
    from retrieval.collections.opening import open_collection
    from retrieval.collections.recall import measure_recall

    with open_collection(collection) as opened:
        report = measure_recall(opened, queries, k, where)
        record = {"model": opened.model, "dim": opened.dim, "snapshots": opened.snapshots()}
    text = (
        f"{report.items} items of dimension {record['dim']}; {report.queries} queries: recall@{k} {report.recall:.4f}"
    )
    _tell(as_json, f"{text} (least {report.least:.2f})", **asdict(report), **record)


def search(
    collection: Annotated[str, typer.Argument(help="A folder, s3://bucket/prefix, or http://host:port/name.")],
    text: Annotated[str | None, typer.Argument(help="What to look for, in words ...")] = None,
    image: Annotated[Path | None, typer.Option(help="... or a picture file.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many items.")] = 10,
    where: Where = None,
    sheet: Annotated[Path | None, typer.Option(help="Write the pictures that were found side by side as PNG.")] = None,
    shards: Annotated[str | None, typer.Option(help="Where the pictures lie; default: where they were read.")] = None,
    model: TowersModel = "emoji",
    device: Device = "auto",
    dtype: TowersDtype = "float32",
    as_json: Json = False,
) -> None:
    """The items most similar to a text or a picture, best first."""
    from retrieval.collections.opening import CollectionError, open_collection

    if (text is None) == (image is None):
        raise CollectionError("give a text or --image: one of them is what to look for")
    with open_collection(collection) as opened:
        query = _embed_query(opened, text, image, model, device, dtype)
        hits = opened.search(query, k, where)
    if sheet:
        _write_sheet(sheet, hits, shards)
    for hit in hits:
        if as_json:
            print(json.dumps(asdict(hit), ensure_ascii=False))
        else:
            print(f"{hit.score:.4f}  {hit.id}  {_describe(hit)}")


@contextmanager
def _source(sources: list[str], model: str, device: str, dtype: str) -> Iterator[Vectors]:
    """Vectors that are there, or those of shards, which lie in a temporary folder while they are needed."""
    from data.reading import expand_shards
    from mmwudao.loading.towers import load_model_towers
    from retrieval.vectors.embed import embed_shards
    from retrieval.vectors.parquet import is_vectors, open_vectors

    if len(sources) == 1 and is_vectors(Path(sources[0])):
        yield open_vectors(Path(sources[0]))
        return
    shards = {shard.stem: shard.resolve() for shard in expand_shards(sources)}
    with tempfile.TemporaryDirectory(prefix="mmwudao-vectors-") as folder:
        towers = load_model_towers(model, device, dtype)
        embed_shards(towers, sources, folder, progress=sys.stderr.isatty())
        yield open_vectors(Path(folder), shards)


def _store(vectors: Vectors, kind: str, store: Callable[[pa.Table], None]) -> int:
    """Hand all items to `store`. Returns how many there were."""
    from tqdm import tqdm

    from retrieval.vectors.parquet import read_vectors

    count = 0
    with tqdm(unit=" items", disable=not sys.stderr.isatty()) as bar:
        for items in read_vectors(vectors, cast("Kind", kind)):
            store(items)
            bar.update(len(items))
            count += len(items)
    return count


def _embed_query(
    collection: Collection, text: str | None, image: Path | None, model: str, device: str, dtype: str
) -> NDArray[Any]:
    """The vector [D] of a text or a picture. Raises `ValueError`, also when the collection is of other towers."""
    from mmwudao.loading.towers import load_model_towers
    from mmwudao.tasks import read_pictures
    from retrieval.collections.opening import CollectionError
    from vqvae.storage.parts import content_hash

    pictures = read_pictures([image]) if image else []
    query = as_typed(text or "")
    if not (pictures or query.strip()):
        raise CollectionError("an empty text: say what to look for")
    towers = load_model_towers(model, device, dtype)
    if collection.model and collection.model != content_hash(towers):
        raise CollectionError(
            f"the collection holds vectors of other towers ({collection.model[:12]}) than {model!r}: give --model"
        )
    return (towers.encode_image(pictures) if pictures else towers.encode_text([query]))[0].numpy()


def _describe(hit: Hit) -> str:
    """What a line of the result says of an item: its text or its captions, and its family."""
    captions = [value for name, value in sorted(hit.metadata.items()) if name == "text" or name.startswith("caption_")]
    family = hit.metadata.get("family")
    return " / ".join(map(str, captions)) + (f"  ({family})" if family else "")


def _write_sheet(path: Path, hits: list[Hit], shards: str | None) -> None:
    """The pictures of `hits`, in order. Raises `ValueError` when one is not where it should lie."""
    from data.atomic import write_files
    from data.images import open_image, to_square
    from mmwudao.loading.stored_pictures import stored_samples
    from mmwudao.pictures import encode_png, grid
    from retrieval.collections.opening import CollectionError

    if not hits:
        raise CollectionError("nothing was found: there is no sheet to write")
    samples = stored_samples(hits, shards)
    missing = [hit for hit in hits if hit.id not in samples]
    if missing:
        place = shards or missing[0].metadata.get("shard", "")
        raise CollectionError(f"the picture of {missing[0].id} is not in {place!r}: give --shards, where it was read")
    pictures = [to_square(open_image(samples[hit.id].image), SHEET_PIXELS) for hit in hits]
    write_files({path: encode_png(grid(pictures))})


def _tell(as_json: bool, text: str, **record: object) -> None:
    print(json.dumps(record, ensure_ascii=False) if as_json else text)
