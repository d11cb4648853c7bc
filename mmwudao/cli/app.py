"""The command line: the tree of commands, and the one place where an error becomes a line and an exit code.

No module of this package that is imported here imports PyTorch, NumPy or Pillow outside its commands, so that every
`--help` answers at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from mmwudao.cli import data, demo, describe, draw, evaluate, importing, index, search, serve, train, vectors
from mmwudao.cli.extras import missing_extra
from mmwudao.version import __version__

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, the shells' convention
TERMINATED = 143  # 128 + SIGTERM
CLOSED_PIPE = 1  # as Click has it: `mmwudao ... | head` ends in silence


class _Terminated(BaseException):
    """SIGTERM, as an exception that lets blocks clean up, as Ctrl-C does."""

app = typer.Typer(
    help="Draw pictures from sentences and describe pictures, in seven languages; prepare data, and train the models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a traceback means a bug of ours: plain text is easiest to report
)
app.command()(draw.generate)
app.command()(draw.replay)
app.command()(describe.caption)
app.command()(describe.ask)
app.command()(describe.rerank)
app.command()(describe.complete)
app.command()(describe.upscale)
app.command()(draw.info)
app.command()(train.tokenize)
app.command()(train.assemble)
app.command("embed")(vectors.embed_command)
app.command("search")(search.search_command)
app.command()(serve.serve)
app.command()(demo.demo)
app.add_typer(train.app, name="train")
app.add_typer(data.app, name="data")
app.add_typer(importing.app, name="import")
app.add_typer(evaluate.app, name="eval")
app.add_typer(vectors.export_app, name="export")
app.add_typer(index.app, name="index")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mmwudao {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with `arguments` (default: the process's own) and return the exit code.

    0 is success; bad input of any kind is one line on stderr and 2; Ctrl-C is 130, SIGTERM 143, a reader of stdout that
    has left 1, in silence. Whatever stops a command, what it had half written is removed.
    """
    with _terminable():
        return _run(arguments)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises `_Terminated` once; a second one ends the process at once. Other handlers are left alone."""
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    def terminate(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(arguments: Sequence[str] | None) -> int:
    """See `run`."""
    for stream in (sys.stdout, sys.stderr):
        # prompts and file names are printed in any script, whatever the locale says
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    # where torchao is installed, transformers imports it, which warns of a change that is its own affair
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    try:
        result = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        code = result if isinstance(result, int) else 0
        sys.stdout.flush()
    except typer.TyperException as error:
        return _fail(error.format_message())
    except ModuleNotFoundError as error:
        if (line := missing_extra(error)) is None:
            raise
        return _fail(line)
    except BrokenPipeError:
        # else the interpreter complains when it flushes stdout at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except _Terminated:
        print("terminated", file=sys.stderr)
        return TERMINATED
    except MemoryError:
        return _fail("not enough memory for this")
    except OSError as error:  # a read-only or full disk, a path that is no folder
        place = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{place}")
    except ValueError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code


def _fail(message: str) -> int:
    """One line, whatever the message looked like."""
    if message:  # a group of commands without a command prints its help and has no more to say
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT
