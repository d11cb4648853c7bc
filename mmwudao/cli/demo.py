"""`demo`: the page in a browser. Heavy imports happen inside the command."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Literal

import typer

from mmwudao.cli.draw import Device, Dtype, Model, choose_threads

Language = Literal["zh", "en"]  # as in `mmwudao.demo.words`, which is not imported for --help


def demo(
    model: Model = "emoji",
    collection: Annotated[
        str | None, typer.Option(help="What is searched: a folder, a bucket or a server; default: the sample pictures.")
    ] = None,
    shards: Annotated[
        str | None, typer.Option(help="Where its pictures lie; default: where they were read from.")
    ] = None,
    added: Annotated[
        Path, typer.Option(help="The folder for pictures that visitors add to the collection.")
    ] = Path("mmwudao-out/added"),
    language: Annotated[Language, typer.Option(help="Of the first page; the other is a click away.")] = "en",
    host: Annotated[
        str, typer.Option(help="The address to listen on; beyond this machine, whoever reaches it may use it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Also open a public address through Gradio's servers, without a password.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Draw, search, describe, complete and enlarge pictures in a browser; Ctrl-C ends it."""
    choose_threads()
    from mmwudao.demo.app import build, opened, start
    from mmwudao.pipeline import load

    pipeline = load(model, device, dtype)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with opened(pipeline, collection, shards, added) as actions:
        page = build(actions, language)
        try:
            print(start(page, host, port, share))
            if share or host not in ("127.0.0.1", "localhost", "::1"):
                print("warning: whoever reaches this address can use the demo: there is no password", file=sys.stderr)
            threading.Event().wait()
        except KeyboardInterrupt:
            print("the demo has ended", file=sys.stderr)
        finally:
            page.close(verbose=False)
