"""`python -m mmwudao`, and the console script."""

from __future__ import annotations

import atexit
import logging
import os
import sys

from mmwudao.cli.app import run
from mmwudao.loading.threads import wait_passively


def main() -> None:
    """Run the command line and leave with its exit code."""
    wait_passively()
    leave(run())


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
