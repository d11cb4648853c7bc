"""`python -m mmwudao`, and the console script."""

from __future__ import annotations

import atexit
import logging
import os
import sys

from mmwudao.cli.app import run
from mmwudao.loading.allocator import keep_freed_memory
from mmwudao.loading.threads import wait_passively


def main() -> None:
    """Run the command line and leave with its exit code."""
    open_closed_streams()
    wait_passively()
    keep_freed_memory()
    leave(run())


def open_closed_streams() -> None:
    """Give a standard stream that the shell has closed (`>&-`) the null device; Python has None in its place.

    Without it, what is printed fails, and the first file that is opened gets the stream's number, to which libraries
    in C print.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))


def leave(code: int) -> None:
    """End the process with an exit code, and without the page of "leaks" that Triton's library prints at its end.

    PyTorch imports Triton where it is installed. Its bindings live as long as the interpreter, which they call a leak.
    """
    if "triton" in sys.modules:
        # all that an orderly end does before the interpreter is taken down
        atexit._run_exitfuncs()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
