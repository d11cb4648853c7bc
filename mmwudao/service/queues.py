"""What is served, without HTTP: the models and the collection, each behind a bounded queue of its own."""

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

from generation.drawing.blocks import full_block
from mmwudao.pipeline import Pipeline
from mmwudao.service.batching import Batcher
from mmwudao.service.drawing import Commission, draw_block
from mmwudao.service.errors import NotFound
from mmwudao.service.metrics import Metrics
from mmwudao.service.settings import ServiceConfig
from retrieval.collections.opening import Collection
from retrieval.towers.base import Towers, to_device
from vqvae.storage.parts import content_hash

T = TypeVar("T")
Watch = Callable[[str, int, float], None]  # of a `Batcher`


class Embedded(NamedTuple):
    """A vector, float32 [D] of unit length, and the tokens that were read for it."""

    vector: NDArray[numpy.float32]
    tokens: int


@dataclass(frozen=True)
class Served:
    """What one server has; what is None it cannot do."""

    name: str
    towers: Towers | None = None
    pipeline: Pipeline | None = None
    collection: Collection | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` for nothing at all, and for a collection of other towers' vectors."""
        if self.towers is None and self.pipeline is None:
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
        """Among embed, draw, caption, search."""
        describes = self.pipeline is not None and self.pipeline.config.describes != "no"
        having = {"embed": self.towers, "draw": self.pipeline, "caption": describes, "search": self.collection}
        return [name for name, there in having.items() if there is not None and there is not False]


class Engine:
    """The queues in front of what is served."""

    def __init__(self, served: Served, config: ServiceConfig, metrics: Metrics) -> None:
        self.served, self.config = served, config
        watch, threads = metrics.watch_batch, torch.get_num_threads()
        self._threads = threads
        # several passes at a time, not all threads at one: those wait for each other at every layer, and spin,
        # while requests and decoding need the cores
        on_cpu = served.towers is not None and served.towers.device.type == "cpu"
        workers = min(config.tower_workers, threads) if on_cpu else 1
        share = partial(torch.set_num_threads, threads // workers)
        self._whole = partial(torch.set_num_threads, threads)
        self.texts: Batcher[str, Embedded] = Batcher(
            "texts", self._embed_texts, max_batch=config.batch_texts, limit=config.waiting_texts,
            window=config.window, workers=workers, begin=share, watch=watch,
        )  # fmt: skip
        self.images: Batcher[Tensor, Embedded] = Batcher(
            "images", self._embed_images, max_batch=config.batch_images, limit=config.waiting_images,
            window=config.window, workers=workers, begin=share, watch=watch,
        )  # fmt: skip
        self.drawings: Batcher[Commission, Any] = self._drawing_queue(watch)
        self.tasks: Batcher[Callable[[], Any], Any] = self._task_queue(watch)
        # pictures for tasks stay as large as they were sent: one request's are ready while another's are looked at
        self.decoded_tasks = asyncio.Semaphore(2)
        self.searches: Batcher[Callable[[], Any], Any] = Batcher(
            "searches", call_jobs, max_batch=1, limit=config.waiting_searches, workers=2, watch=watch
        )
        # one after the other: writers of a collection exclude each other
        self.writes: Batcher[Callable[[], Any], Any] = Batcher(
            "writes", call_jobs, max_batch=1, limit=config.waiting_searches, watch=watch
        )
        self._batchers: list[Batcher[Any, Any]] = [
            self.texts, self.images, self.drawings, self.tasks, self.searches, self.writes
        ]  # fmt: skip
        for batcher in self._batchers:
            metrics.watch_queue(batcher.name, lambda batcher=batcher: batcher.reserved)  # type: ignore[misc]

    def _drawing_queue(self, watch: Watch) -> Batcher[Commission, Any]:
        pipeline, config = self.served.pipeline, self.config
        # a guided picture takes two rows of a block
        block = full_block(pipeline.generator.config, pipeline.grid) // 2 if pipeline else 1
        return Batcher(
            "drawings", self._draw, max_batch=block, limit=config.waiting_drawings, window=config.drawing_window,
            key=lambda commission: commission.drawing.options, begin=self._whole, watch=watch,
        )  # fmt: skip

    def _task_queue(self, watch: Watch) -> Batcher[Callable[[], Any], Any]:
        limit = self.config.waiting_tasks
        return Batcher("tasks", call_jobs, max_batch=1, limit=limit, begin=self._whole, watch=watch)

    def start(self) -> None:
        for batcher in self._batchers:
            batcher.start()

    async def stop(self) -> None:
        """Finish what was accepted."""
        for batcher in self._batchers:
            await batcher.stop()
        torch.set_num_threads(self._threads)  # what a thread sets for itself is also what later threads begin with

    @property
    def towers(self) -> Towers:
        return _there(self.served.towers, "towers: it makes no vectors")

    @property
    def pipeline(self) -> Pipeline:
        return _there(self.served.pipeline, "generator: it does not draw or describe")

    @property
    def collection(self) -> Collection:
        return _there(self.served.collection, "collection: it does not search")

    def check_model(self, name: str | None) -> None:
        """`NotFound` for a model that is not the one served."""
        if name is not None and name != self.served.name:
            message = f"no model of that name here: this server has {self.served.name!r}"
            raise NotFound(message, param="model", code="model_not_found")

    async def run_task(self, queue: Batcher[Callable[[], Any], Any], job: Callable[[], T]) -> T:
        """`job` in a thread of `queue`. Raises `Busy`."""
        async with queue.reserve(1):
            result: T = (await queue.submit([job]))[0]
            return result

    def _embed_texts(self, texts: list[str]) -> list[Embedded]:
        towers = self.towers
        tokens = towers.tokenize(texts)
        read = (tokens if isinstance(tokens, Tensor) else tokens["ids"]) != 0  # all kinds pad with 0
        with torch.inference_mode():
            vectors = towers.encode_tokens(to_device(tokens, towers.device)).cpu().numpy()
        return [Embedded(*both) for both in zip(vectors, read.sum(dim=1).tolist(), strict=True)]

    def _embed_images(self, pixels: list[Tensor]) -> list[Embedded]:
        with torch.inference_mode():
            vectors = self.towers.encode_image(torch.stack(pixels), len(pixels)).numpy()
        return [Embedded(vector, 0) for vector in vectors]

    def _draw(self, block: list[Commission]) -> list[Any]:
        return draw_block(self.pipeline, block)


def call_jobs(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    return [job() for job in jobs]


def _there(part: T | None, missing: str) -> T:
    if part is None:
        raise NotFound(f"this server has no {missing}")
    return part
