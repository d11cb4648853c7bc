"""Shards through a model with all cores busy: a thread decodes and encodes a batch, and batches come back in order.

Several batches at a time use a CPU better than one batch whose products are split among threads: those threads spin
until the slowest is done, and decoding on the same cores slows one of them. Pillow and PyTorch release Python's lock
while they compute, so threads suffice: no process is started, and nothing is copied between processes.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from PIL import Image

from data.images import ImageTooLarge, open_image
from data.reading import CORRUPT_IMAGE, TOO_LARGE, Skip, read_entries
from data.sample import DataError, Needed, Sample

AHEAD = 2  # batches waiting or worked on, for each thread

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")


class Batch(NamedTuple, Generic[Result]):
    """Samples of `shard`, without their encoded pictures, and what was made of them; among them what was skipped."""

    shard: Path
    entries: list[tuple[Sample, Result] | Skip]
    last: bool  # of its shard


def encode_shards(
    shards: Iterable[Path],
    prepare: Callable[[Image.Image, Sample], Prepared],
    encode: Callable[[list[Prepared]], Iterable[Result]],
    *,
    batch_size: int,
    workers: int | None = None,
    device: torch.device | str = "cpu",
    least_side: int | None = None,
    captions: Needed = True,
) -> Generator[Batch[Result]]:
    """All samples of `shards` in order; every shard has a last batch, if an empty one.

    `prepare` takes a decoded RGB picture and its sample, and `encode` up to `batch_size` of what it made; both run in
    `workers` threads (default: one a core), each of which has its share of PyTorch's threads and the memory of a
    batch. On any device but the CPU one batch is encoded at a time. What they raise comes out in its turn. `least_side`
    is that of `open_image`, `captions` that of `read_shard`.
    Close the iterator (`contextlib.closing`) to stop early. Raises `DataError` for a size or number below 1.
    """
    if batch_size < 1:
        raise DataError(f"a batch holds at least one picture, not {batch_size}")
    if workers is not None and workers < 1:
        raise DataError(f"at least one worker is needed, not {workers}")
    turn: AbstractContextManager[Any] = nullcontext() if torch.device(device).type == "cpu" else threading.Lock()

    def work(batch: Batch[bytes]) -> Batch[Result]:
        decoded = [_decode(batch.shard, entry, prepare, least_side) for entry in batch.entries]
        pictures = [entry[1] for entry in decoded if not isinstance(entry, Skip)]
        results: Iterator[Result] = iter(())
        if pictures:
            with turn:
                results = iter(encode(pictures))
        entries = [entry if isinstance(entry, Skip) else (entry[0], next(results)) for entry in decoded]
        return Batch(batch.shard, entries, batch.last)

    batches = (batch for shard in shards for batch in _read_batches(shard, batch_size, captions))
    return in_order(work, batches, workers or cores())


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result]:
    """`work(item)` of each item, computed in `workers` threads, in the order of the items.

    An error, of `work` or in `items`, is raised when the results before it were given out.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, threads // workers),))
    window: deque[Future[Result]] = deque()
    source, problem = iter(items), None
    try:
        while problem is None:
            try:
                window.append(pool.submit(work, next(source)))
            except Exception as error:  # StopIteration too
                problem = error
            if len(window) == AHEAD * workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
        if not isinstance(problem, StopIteration):
            raise problem
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what threads that start later take for the number


def cores() -> int:
    """How many cores this process may use: by its affinity, and by the quota of its control group (cgroup v2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # there is no control group, or it has no quota ("max")
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


def _read_batches(shard: Path, size: int, captions: Needed) -> Iterator[Batch[bytes]]:
    """The samples of a shard with their encoded pictures, `size` in each batch."""
    entries: list[tuple[Sample, bytes] | Skip] = []
    samples = 0
    for entry in read_entries(shard, captions):
        if isinstance(entry, Skip):
            entries.append(entry)
            continue
        if samples == size:
            yield Batch(shard, entries, last=False)
            entries, samples = [], 0
        samples += 1
        entries.append((replace(entry, image=None), entry.require_image()))
    yield Batch(shard, entries, last=True)


def _decode(
    shard: Path,
    entry: tuple[Sample, bytes] | Skip,
    prepare: Callable[[Image.Image, Sample], Prepared],
    least_side: int | None,
) -> tuple[Sample, Prepared] | Skip:
    if isinstance(entry, Skip):
        return entry
    sample, image = entry
    try:
        return sample, prepare(open_image(image, least_side=least_side), sample)
    except DataError as error:
        reason = TOO_LARGE if isinstance(error, ImageTooLarge) else CORRUPT_IMAGE
        return Skip(reason, f"{shard.name}: sample {sample.id}", error)
