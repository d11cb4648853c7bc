"""A Ray cluster to work on: many machines, or the cores of this one (pip install 'mmwudao[ray]')."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

LOCAL = "local"
# for a cluster that we start: Ray's own niceness of 15 means that a worker hardly runs on a busy machine
DEFAULTS = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Inside the block this process is a driver of the cluster at `address`, unless it is one of some cluster already.

    "local" starts a cluster of this machine's cores, which ends with the block; "auto" is the one that this machine
    belongs to (or `RAY_ADDRESS`); else HOST:PORT. Raises `ValueError` without Ray, or without a cluster there.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("work on several machines needs Ray: pip install 'mmwudao[ray]'") from error
    if ray.is_initialized():
        yield
        return
    if address == LOCAL:
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        ray.init(
            address=address, include_dashboard=False if address == LOCAL else None, logging_level=logging.WARNING
        )
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"no Ray cluster at {address!r} ({error}): begin one by `ray start`, or say local") from error
    try:
        yield
    finally:
        ray.shutdown()
