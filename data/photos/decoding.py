"""Many picture files to small RGB pixels, in a process of one thread on each core.

A process of its own also bounds what a hostile file can do: if a decoder crashes, that picture is unreadable, no more.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.images import ImageTooLarge
from data.photos.reading import MissingReader, read_photo
from data.sample import DataError

# as `data.reading` counts them, which imports PyTorch
CORRUPT, TOO_LARGE = "corrupt image", "picture too large"
NO_READER, NOT_READ, CRASHED = "no reader", "unreadable file", "decoder crashed"
MARGIN = 2  # pixels for each pixel of the towers' input: enough for a sharp picture in any way of scaling


@dataclass(frozen=True)
class PhotoJob:
    """A file to decode, until its shorter side has `MARGIN * side` pixels. What is in `known` needs no pixels."""

    file: str
    side: int
    known: frozenset[str] = frozenset()  # contents, as `DecodedPhoto.content` names them


@dataclass(frozen=True)
class DecodedPhoto:
    """What a file holds: the SHA-256 of its bytes in 32 hexadecimal digits, and pixels [H, W, 3] unless it is known."""

    content: str
    pixels: NDArray[np.uint8] | None
    taken: str | None = None


@dataclass(frozen=True)
class UnreadablePhoto:
    """The reason that the file is counted under, and the problem in one line."""

    reason: str
    problem: str


def decode_photo(job: PhotoJob) -> DecodedPhoto | UnreadablePhoto:
    """Read and decode one file. Raises nothing for a file that cannot be used."""
    try:
        with open(job.file, "rb") as file:
            encoded = file.read()
        content = hashlib.sha256(encoded).hexdigest()[:32]
        if content in job.known:
            return DecodedPhoto(content, None)
        image = read_photo(encoded, os.path.splitext(job.file)[1], MARGIN * job.side)
        taken = image.info.get("taken")
        return DecodedPhoto(content, np.asarray(_shrunk(image, MARGIN * job.side)), taken)
    except ImageTooLarge as error:
        return UnreadablePhoto(TOO_LARGE, str(error))
    except MissingReader as error:
        return UnreadablePhoto(NO_READER, str(error))
    except DataError as error:
        return UnreadablePhoto(CORRUPT, str(error))
    except MemoryError:
        return UnreadablePhoto(TOO_LARGE, "the memory of this machine does not suffice")
    except OSError as error:
        return UnreadablePhoto(NOT_READ, error.strerror or str(error))


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    """The picture with a shorter side of `side` pixels, or as it is if it has fewer."""
    shorter = min(image.size)
    if shorter <= side:
        return image
    size = (max(1, round(image.width * side / shorter)), max(1, round(image.height * side / shorter)))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


class PhotoDecoder:
    """Decodes in `workers` processes. Used from several threads; leave its `with` block to end the processes."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pools: dict[str, ProcessPoolExecutor] = {}  # "many", and "alone" for pictures under suspicion
        self._lock = threading.Lock()
        self._one_suspect = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)

    def submit(self, jobs: Sequence[PhotoJob]) -> list[Future[DecodedPhoto | UnreadablePhoto]]:
        """Begin to decode; `collect` waits for the results."""
        return [self._submit("many", job) for job in jobs]

    def collect(
        self, jobs: Sequence[PhotoJob], futures: Sequence[Future[DecodedPhoto | UnreadablePhoto]]
    ) -> list[DecodedPhoto | UnreadablePhoto]:
        """The results of `submit`, in the order of `jobs`."""
        results = []
        for job, future in zip(jobs, futures, strict=True):
            try:
                results.append(future.result())
            except BrokenProcessPool:  # this picture or one that was decoded at the same time
                results.append(self._alone(job))
        return results

    def _alone(self, job: PhotoJob) -> DecodedPhoto | UnreadablePhoto:
        try:
            with self._one_suspect:
                return self._submit("alone", job).result()
        except BrokenProcessPool:
            return UnreadablePhoto(CRASHED, "the process that decoded it was ended: a damaged or hostile file")

    def _submit(self, name: str, job: PhotoJob) -> Future[DecodedPhoto | UnreadablePhoto]:
        with self._lock:
            try:
                return self._pool(name).submit(decode_photo, job)
            except BrokenProcessPool:
                self._pools.pop(name).shutdown()
                return self._pool(name).submit(decode_photo, job)

    def _pool(self, name: str) -> ProcessPoolExecutor:
        if name not in self._pools:
            # "spawn": a fork of a process with threads may wait for a lock that nobody holds
            context = multiprocessing.get_context("spawn")
            workers = self._workers if name == "many" else 1
            self._pools[name] = ProcessPoolExecutor(workers, context, initializer=_begin)
        return self._pools[name]


def _begin() -> None:
    """In a new process: leave Ctrl-C to the parent, and end with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
