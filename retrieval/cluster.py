"""Connects to a Ray cluster of many machines, or starts one on this machine (pip install 'mmwudao[ray]')."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

LOCAL = "local"
# for a cluster that we start: with Ray's default niceness of 15, a worker hardly runs on a busy machine
DEFAULTS = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Make this process a driver of the cluster at `address` inside the block, unless it is connected already.

    "local" starts a cluster on this machine's cores, which ends with the block; "auto" is the cluster that this
    machine belongs to (or `RAY_ADDRESS`); anything else is HOST:PORT. Raises `ValueError` if Ray is not installed or
    no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("working on several machines needs Ray: pip install 'mmwudao[ray]'") from error
    if ray.is_initialized():
        yield
        return
    if address == LOCAL:
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        ray.init(address=address, include_dashboard=False if address == LOCAL else None, logging_level=logging.WARNING)
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"no Ray cluster at {address!r} ({error}): run `ray start`, or give local") from error
    try:
        yield
    finally:
        ray.shutdown()
