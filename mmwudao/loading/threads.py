"""How the threads of a program wait for each other; imports nothing heavy, since it must run before PyTorch.

OpenMP's threads meet at the end of every matrix product, and one that comes early spins until the others are there.
On a machine that does other work the one that is waited for may not be running at all, and spinning keeps the core
that it needs. Threads that sleep instead leave the core.
"""

from __future__ import annotations

import os

# libgomp (PyTorch's on Linux) and LLVM's library read these once, when they are loaded
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user's environment says how they wait."""
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ.update(PASSIVE)
