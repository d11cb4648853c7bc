"""`search`: what is most like some texts and pictures, as lines, paths, a sheet or thumbnails.

Heavy imports happen inside the command.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmwudao.cli.options import Device, Json, as_typed, option_groups
from mmwudao.cli.output import check_png
from mmwudao.cli.photos import Maker, PhotoOptions, update_photos
from mmwudao.cli.vectors import TowersDtype
from mmwudao.loading.options import VectorMaker

if TYPE_CHECKING:
    from PIL import Image

    from retrieval.collections.opening import Hit
    from retrieval.collections.terms import Query
    from retrieval.photos.places import PhotoPlace
    from retrieval.towers.base import Towers

SHEET_PIXELS = 128  # the side of each picture on a PNG sheet
PAGE_PIXELS = 320  # the longer side of each on an HTML sheet, and in the terminal
HTML = (".html", ".htm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """What is searched."""

    folder: Annotated[
        Path | None,
        typer.Option("--in", metavar="FOLDER", help="Search the pictures in this folder; default: the current one."),
    ] = None
    collection: Annotated[
        str | None,
        typer.Option(help="Search this collection: a folder, s3://bucket/prefix, or http://host:port/name."),
    ] = None
    update: Annotated[
        bool, typer.Option("--update", help="Look for new, changed and removed pictures of the folder before.")
    ] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """How what is found is shown."""

    sheet: Annotated[
        Path | None, typer.Option(help="Write the pictures of the results to this file: .html, else a PNG.")
    ] = None
    open_sheet: Annotated[bool, typer.Option("--open", help="Open the sheet in the program for its kind.")] = False
    preview: Annotated[bool, typer.Option("--preview", "-p", help="Show thumbnails in the terminal.")] = False
    paths: Annotated[bool, typer.Option("--paths", help="Print nothing but the paths, for other programs.")] = False
    null: Annotated[bool, typer.Option("--null", "-0", help="With --paths: end each with NUL, for xargs -0.")] = False
    as_json: Json = False

    def check(self) -> None:
        """Raises `ValueError` for ways that exclude each other."""
        if sum((self.preview, self.paths, self.as_json)) > 1:
            raise ValueError("give one of --preview, --paths and --json")
        if self.null and not self.paths:
            raise ValueError("--null is for --paths")
        if self.sheet is not None and self.sheet.suffix.lower() not in HTML:
            check_png(self.sheet)
        if self.preview:
            from mmwudao.cli.preview import check_terminal

            check_terminal()


@dataclasses.dataclass(frozen=True)
class _Target:
    """The collection that is searched, and the folder of pictures that it follows, if it does."""

    location: str
    place: PhotoPlace | None
    words: list[str]  # of the query

    def maker(self, model: str | None, by: VectorMaker | None) -> Maker:
        """What makes the query's vector: what the user names, else what a folder was indexed by."""
        called = model or (self.place.model if self.place else "") or "emoji"
        return Maker(called, by or ("generator" if self.place and self.place.by == "generator" else "towers"))


@option_groups
def search_command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[COLLECTION] QUERY...",
            help="A text, or a picture such as ./cat.jpg; more of them after + or -, with weights such as '2*snow'.",
        ),
    ] = None,
    *,
    where_to: PlaceOptions,
    image: Annotated[Path | None, typer.Option(help="Search for this picture file, with the QUERY or without.")] = None,
    k: Annotated[int, typer.Option("-k", "--top", help="Return this many items.")] = 10,
    where: Annotated[
        str | None, typer.Option(help="Consider only items for which this is true: \"taken > '2019'\".")
    ] = None,
    show: ShowOptions,
    shards: Annotated[
        str | None, typer.Option(help="Read the pictures from these shards; by default from where they were embedded.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Use this model or folder of towers; default: what a folder was indexed with.")
    ] = None,
    by: Annotated[
        VectorMaker | None,
        typer.Option(help="Take the vectors of the model's towers, or of its generator; default: as for the folder."),
    ] = None,
    device: Device = "auto",
    dtype: TowersDtype = "float32",
) -> None:
    """Find the pictures most like a text or a picture, best first.

    In a folder that was indexed: search "a beach" + ./sunset.jpg - people
    """
    from retrieval.collections.opening import open_collection
    from retrieval.collections.query import check_towers, embed_query
    from retrieval.collections.where import all_of

    show.check()
    target = _find_target([as_typed(word) for word in words or []], where_to, image)
    query = _read_query(target.words, image)
    place, maker = target.place, target.maker(model, by)

    def load_towers() -> Towers:
        return maker.load(device, dtype)

    if where_to.update:
        if place is None:
            raise ValueError("--update is for the pictures of a folder")
        update_photos(place.folder, str(place.collection), PhotoOptions(), load_towers, maker, quiet=True)
    own = {file.resolve() for file in query.files} if place else set()
    conditions = [part for part in (place.condition if place else None, where) if part]
    with open_collection(target.location) as opened:
        towers = load_towers()
        check_towers(opened, target.location, towers)
        hits = opened.search(embed_query(towers, query), k + len(own), all_of(conditions))
    if place:  # a picture that is searched for is not what is looked for
        hits = [hit for hit in hits if "path" not in hit.metadata or place.photo(hit) not in own][:k]
    _show(hits, place, show, shards, title=" ".join(target.words))


def _find_target(words: list[str], options: PlaceOptions, image: Path | None) -> _Target:
    """What to search: what the options name, else a collection that is the first word, else the current folder."""
    from retrieval.collections.terms import SIGNS
    from retrieval.photos.places import find_place, is_collection, read_place

    if options.folder is not None and options.collection is not None:
        raise ValueError("give --in or --collection, not both")
    location = options.collection
    if location is None and options.folder is None and words:
        first_of_two = len(words) > 1 and not {words[0], words[1]} & set(SIGNS)
        if is_collection(words[0]) or first_of_two or (image is not None and len(words) == 1):
            location, words = words[0], words[1:]
    if location is not None:
        return _Target(location, None if "://" in location else read_place(location), words)
    place = find_place(options.folder or Path())
    return _Target(str(place.collection), place, words)


def _read_query(words: Sequence[str], image: Path | None) -> Query:
    """The query of the words and of --image. Raises `ValueError` for neither, and for what `read_query` refuses."""
    from retrieval.collections.terms import Query, Term, read_query

    if image is None:
        return read_query(words)
    if not image.is_file():
        raise ValueError(f"no picture at {image}")
    return Query((Term(image), *(read_query(words).terms if words else ())))


def _show(hits: list[Hit], place: PhotoPlace | None, show: ShowOptions, shards: str | None, title: str) -> None:
    files = [place.photo(hit) if place and "path" in hit.metadata else None for hit in hits]
    if show.sheet or show.open_sheet:
        _write_sheet(hits, files, place, show, shards, title)
    if show.paths:
        missing = next((hit.id for hit, file in zip(hits, files, strict=True) if file is None), None)
        if missing is not None:
            raise ValueError(f"{missing} is no file, but a sample of a shard: --paths is for folders of pictures")
        sys.stdout.flush()
        end = b"\0" if show.null else b"\n"
        sys.stdout.buffer.write(b"".join(os.fsencode(str(file)) + end for file in files))
        sys.stdout.flush()
        return
    if show.preview:
        from mmwudao.cli.preview import show_thumbnails

        show_thumbnails(_pictures(hits, place, shards), [_line(*pair) for pair in zip(hits, files, strict=True)])
        return
    for hit, file in zip(hits, files, strict=True):
        if show.as_json:
            record = asdict(hit) | ({"file": str(file)} if file else {})
            print(json.dumps(record, ensure_ascii=False))
        else:
            print(_line(hit, file))


def _line(hit: Hit, file: Path | None) -> str:
    if file is not None:
        return f"{hit.score:.4f}  {file}"
    from retrieval.collections.query import hit_captions

    family = hit.metadata.get("family")
    return f"{hit.score:.4f}  {hit.id}  {' / '.join(hit_captions(hit))}" + (f"  ({family})" if family else "")


def _pictures(hits: list[Hit], place: PhotoPlace | None, shards: str | None) -> Sequence[Image.Image | None]:
    """The picture of each hit, None for a file that is gone. Raises `CollectionError` for a sample that is missing."""
    from retrieval.collections.query import hit_pictures
    from retrieval.photos.showing import open_hits

    return open_hits(place, hits, PAGE_PIXELS) if place else hit_pictures(hits, PAGE_PIXELS, shards)


def _write_sheet(
    hits: list[Hit],
    files: list[Path | None],
    place: PhotoPlace | None,
    show: ShowOptions,
    shards: str | None,
    title: str,
) -> None:
    """Write the sheet to where it shall be, or to a temporary file, and open it if asked."""
    from PIL import Image

    from data.atomic import write_files
    from data.images import to_square
    from mmwudao.pictures import encode_png, grid
    from mmwudao.sheets import SheetEntry, html_sheet
    from retrieval.collections.opening import CollectionError
    from retrieval.collections.query import hit_pictures

    if not hits:
        raise CollectionError("the search returned nothing: there are no pictures to show")
    path = show.sheet or Path(tempfile.mkdtemp(prefix="mmwudao-search-")) / "found.html"
    blank = Image.new("RGB", (SHEET_PIXELS, SHEET_PIXELS), "lightgrey")  # for a file that is gone
    if path.suffix.lower() in HTML:
        pictures = [picture or blank for picture in _pictures(hits, place, shards)]
        links = [file.as_uri() if file else "" for file in files]
        lines = [_line(*pair) for pair in zip(hits, files, strict=True)]
        entries = [SheetEntry(*parts) for parts in zip(pictures, lines, links, strict=True)]
        write_files({path: html_sheet(title, entries)})
    else:
        squares = (
            [to_square(picture or blank, SHEET_PIXELS) for picture in _pictures(hits, place, shards)]
            if place
            else hit_pictures(hits, SHEET_PIXELS, shards)
        )
        write_files({path: encode_png(grid(squares))})
    if show.open_sheet:
        typer.launch(str(path))
        print(path, file=sys.stderr)
