"""`demo`: the page in a browser. Heavy imports happen inside the command."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmwudao.cli.options import DrawingModelOptions, option_groups

if TYPE_CHECKING:
    from mmwudao.pipeline import Pipeline

Language = Literal["zh", "en"]  # as in `mmwudao.demo.words`, which is not imported for --help


@option_groups
def demo(
    *,
    collection: Annotated[
        str | None,
        typer.Option(help="Search this collection, a folder, a bucket or a server; default: the sample pictures."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--in", metavar="FOLDER", help="Search the pictures in this folder, which is indexed first."),
    ] = None,
    shards: Annotated[
        str | None, typer.Option(help="The collection's pictures are in these shards; default: where they were read.")
    ] = None,
    added: Annotated[
        Path, typer.Option(help="Keep the pictures that visitors add to the collection in this folder.")
    ] = Path("mmwudao-out/added"),
    language: Annotated[
        Language, typer.Option(help="The first page is in this language, with a link to the other.")
    ] = "en",
    host: Annotated[
        str, typer.Option(help="Listen on this address; anyone who reaches one other than this machine's may use it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Listen on this port.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Also open a public address through Gradio's servers, without a password.")
    ] = False,
    model: DrawingModelOptions,
) -> None:
    """Draw, search, describe, complete and enlarge pictures in a browser; Ctrl-C ends it."""
    from mmwudao.demo.app import build_page, opened, start

    pipeline = model.load()
    if folder is not None:
        collection = _index(folder, collection, pipeline)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with opened(pipeline, collection, shards, added) as actions:
        page = build_page(actions, language)
        try:
            print(start(page, host, port, share))
            if share or host not in ("127.0.0.1", "localhost", "::1"):
                print("warning: anyone who reaches this address can use the demo, without a password", file=sys.stderr)
            threading.Event().wait()
        except KeyboardInterrupt:
            print("the demo has ended", file=sys.stderr)
        finally:
            page.close(verbose=False)


def _index(folder: Path, collection: str | None, pipeline: Pipeline) -> str:
    """Index the pictures in `folder`, or bring their collection up to date; returns where it is."""
    from retrieval.photos.indexing import PhotoRequest, index_photos

    if collection is not None:
        raise ValueError("give --in or --collection, not both")
    if "towers" not in pipeline.config.parts:
        raise ValueError(f"{pipeline.source} has no towers to search pictures with: give another --model")
    request = PhotoRequest(folder, model=str(pipeline.source))
    return index_photos(lambda: pipeline.towers, request, progress=sys.stderr.isatty()).collection
