"""The models and the collection, each behind a bounded queue of its own; no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmwudao.asking import check_answers
from mmwudao.service.batching import Batcher, BatchLimits, WorkQueue
from mmwudao.service.errors import NotFound, refusals
from mmwudao.service.generators import DrawingQueue, Generator
from mmwudao.service.metrics import Metrics
from mmwudao.service.settings import ServiceConfig
from mmwudao.tasks import check_describes
from retrieval.collections.opening import Collection
from retrieval.towers.base import Towers, to_device
from vqvae.storage.parts import ModelError, content_hash

T = TypeVar("T")
JobQueue = WorkQueue[Callable[[], Any], Any]  # runs functions


class Embedded(NamedTuple):
    """A vector, float32 [D] of unit length, and the number of tokens read for it."""

    vector: NDArray[numpy.float32]
    tokens: int


@dataclass(frozen=True)
class Served:
    """What one server has. A part that is None makes its routes answer 404."""

    name: str
    towers: Towers | None = None
    generator: Generator | None = None
    collection: Collection | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` when there is no model, and for a collection of other towers' vectors."""
        if self.towers is None and self.generator is None:
            raise ValueError("nothing to serve: give a model")
        if self.collection is None or self.towers is None:
            return
        if self.collection.dim != self.towers.embed_dim:
            raise ValueError(
                f"the collection holds vectors of {self.collection.dim} numbers, the towers give "
                f"{self.towers.embed_dim}: serve it with the towers it was made with"
            )
        found = content_hash(self.towers)
        if self.collection.model not in ("", found):
            raise ValueError(
                f"the collection's vectors are of other towers ({self.collection.model[:12]}, not {found[:12]}): "
                "serve it with the towers it was made with"
            )

    @property
    def abilities(self) -> list[str]:
        """Among embed, draw, caption, answer, search."""
        able = {
            "embed": self.towers is not None,
            "draw": self.generator is not None,
            "caption": self.generator is not None and _passes(check_describes, self.generator),
            "answer": self.generator is not None and _passes(check_answers, self.generator),
            "search": self.collection is not None,
        }
        return [name for name, there in able.items() if there]

    def close(self) -> None:
        """Close the collection."""
        if self.collection is not None:
            self.collection.close()


class ServiceQueues:
    """The queues in front of what is served."""

    def __init__(self, served: Served, config: ServiceConfig, metrics: Metrics) -> None:
        self.served, self.config = served, config
        self._watch, self._threads = metrics.watch_batch, torch.get_num_threads()
        self.texts = self._tower_queue("texts", self._embed_texts, config.waiting_texts, config.batch_texts)
        self.images = self._tower_queue("images", self._embed_images, config.waiting_images, config.batch_images)
        generator = served.generator
        self._drawings = generator.drawing_queue(config, self._watch) if generator is not None else None
        workers = generator.concurrent_tasks if generator is not None else 1
        self.tasks = self._job_queue("tasks", config.waiting_tasks, workers)
        # pictures for tasks keep the size they were sent in: two requests at a time hold theirs in memory
        self.decoded_tasks = asyncio.Semaphore(2)
        self.searches = self._job_queue("searches", config.waiting_searches, workers=2)
        # one worker: writers of a collection exclude each other
        self.writes = self._job_queue("writes", config.waiting_searches)
        queues = (self.texts, self.images, self._drawings, self.tasks, self.searches, self.writes)
        self._queues: list[WorkQueue[Any, Any]] = [queue for queue in queues if queue is not None]
        for queue in self._queues:
            metrics.watch_queue(queue.name, lambda queue=queue: queue.reserved)  # type: ignore[misc]

    def _tower_queue(
        self, name: str, run: Callable[[list[T]], list[Embedded]], limit: int, batch: int
    ) -> Batcher[T, Embedded]:
        # several passes at a time, each with a share of the threads: the threads of a single pass wait for each other
        # at every layer, and spin, while requests and decoding need the cores
        on_cpu = self.served.towers is not None and self.served.towers.device.type == "cpu"
        workers = min(self.config.tower_workers, self._threads) if on_cpu else 1
        share = partial(torch.set_num_threads, self._threads // workers)
        limits = BatchLimits(limit, batch, self.config.window, workers)
        return Batcher(name, run, limits, begin=share, watch=self._watch)

    def _job_queue(self, name: str, limit: int, workers: int = 1) -> JobQueue:
        all_threads = partial(torch.set_num_threads, self._threads)
        return Batcher(name, run_jobs, BatchLimits(limit, workers=workers), begin=all_threads, watch=self._watch)

    def start(self) -> None:
        for queue in self._queues:
            queue.start()

    async def stop(self) -> None:
        """Finish what was accepted."""
        for queue in self._queues:
            await queue.stop()
        torch.set_num_threads(self._threads)  # a new thread begins with what the last call set, in whichever thread

    @property
    def towers(self) -> Towers:
        """Raises `NotFound` when the server has none; so do `generator`, `drawings` and `collection`."""
        return _require(self.served.towers, "towers: it makes no vectors")

    @property
    def generator(self) -> Generator:
        return _require(self.served.generator, "generator: it does not draw or describe")

    @property
    def drawings(self) -> DrawingQueue:
        return _require(self._drawings, "generator: it does not draw or describe")

    @property
    def collection(self) -> Collection:
        return _require(self.served.collection, "collection: it does not search")

    def admit(self, method: str, path: str, content_type: str = "") -> None:
        """What can be said of a request before its body is read.

        Raises `NotFound` for a path whose part this server lacks, a `ServiceError` for a model that cannot do it, and
        `QueueFull`.
        """
        if path == "/v1/embeddings":
            assert self.towers is not None
            if content_type.lower().startswith("multipart/"):
                self.images.check_room()  # what is uploaded is a picture
            elif self.images.full:
                self.texts.check_room()  # neither a picture nor a text
        elif path in ("/v1/images/generations", "/v1/images/edits", "/v1/images/variations"):
            self.drawings.check_room()
        elif path == "/v1/captions":
            with refusals():
                check_describes(self.generator)
            self.tasks.check_room()
        elif path == "/v1/chat/completions":
            with refusals():
                check_answers(self.generator)
            self.tasks.check_room()
        elif path == "/v1/rerank" and self.served.towers is None:
            with refusals():
                check_describes(self.generator)
            self.tasks.check_room()
        elif path == "/v1/search" or path.startswith("/v1/items"):
            assert self.collection is not None
            reads = method == "GET" or path in ("/v1/search", "/v1/items/get")
            (self.searches if reads else self.writes).check_room()

    def check_model(self, name: str | None) -> None:
        """Raises `NotFound` for a model that is not the one served."""
        if name is not None and name != self.served.name:
            message = f"no model of that name here: this server has {self.served.name!r}"
            raise NotFound(message, param="model", code="model_not_found")

    async def run_job(self, queue: JobQueue, job: Callable[[], T]) -> T:
        """The result of `job`, which runs in a thread of `queue`. Raises `QueueFull`, and what `job` raises."""
        async with queue.reserve(1):
            result: T = (await queue.submit([job]))[0]
            return result

    def _embed_texts(self, texts: list[str]) -> list[Embedded]:
        towers = self.towers
        tokens = towers.tokenize(texts)
        with torch.inference_mode():
            vectors = towers.encode_tokens(to_device(tokens, towers.device)).cpu().numpy()
        return [Embedded(*both) for both in zip(vectors, towers.count_tokens(tokens), strict=True)]

    def _embed_images(self, pixels: list[Tensor]) -> list[Embedded]:
        with torch.inference_mode():
            vectors = self.towers.encode_image(torch.stack(pixels), len(pixels)).numpy()
        return [Embedded(vector, 0) for vector in vectors]


def _passes(check: Callable[[Generator], object], generator: Generator) -> bool:
    try:
        check(generator)
    except ModelError:
        return False
    return True


def run_jobs(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    return [job() for job in jobs]


def _require(part: T | None, missing: str) -> T:
    if part is None:
        raise NotFound(f"this server has no {missing}")
    return part
