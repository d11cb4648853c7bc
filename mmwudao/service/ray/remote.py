"""A generator that works in other processes: what the application asks of a `Pipeline` and of an `Engine`, sent there.

The application with its keys, caps and queues is that of one server; only drawings and tasks leave the process. Room in
the queues is given here, so that a full one is a 429 at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException

from mmwudao.loading.model_dir import ModelConfig
from mmwudao.pipeline import Drawing, Pipeline
from mmwudao.service.batching import Batcher
from mmwudao.service.drawing import Commission
from mmwudao.service.errors import ServiceError
from mmwudao.service.metrics import Metrics
from mmwudao.service.queues import Engine, Served, Watch, call_jobs
from mmwudao.service.settings import ServiceConfig
from mmwudao.tasks import Judge, Writer

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

LOOK_AGAIN = 0.5  # s, between two looks at whether anybody still waits for a caption
Wanted = tuple[Drawing, frozenset[int]]  # the rows of codes after which a preview is sent


class Lost(ServiceError):
    """A replica ended under a request."""

    status = 503
    kind = "server_error"


@dataclass(frozen=True)
class Described:
    """What is to be known of a generator in order to check requests for it."""

    source: str
    config: ModelConfig
    grid: tuple[int, int]


class GeneratorWorker:
    """The queues for drawings and tasks in front of a pipeline, for the applications of other processes.

    Made inside the event loop that it is used in.
    """

    def __init__(self, name: str, pipeline: Pipeline, config: ServiceConfig) -> None:
        self._pipeline = pipeline
        self._engine = Engine(Served(name, pipeline=pipeline), config, Metrics())
        self._engine.start()

    async def describe(self) -> Described:
        return Described(self._pipeline.source, self._pipeline.config, self._pipeline.grid)

    async def draw(self, wanted: Sequence[Wanted]) -> AsyncGenerator[tuple[int, bool, Image.Image]]:
        """Previews (False) and then the pictures (True), each with its place; closing it stops the drawing."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Image.Image] | None]()

        def commission(index: int, drawing: Drawing, rows: frozenset[int]) -> Commission:
            def preview(image: Image.Image) -> None:
                loop.call_soon_threadsafe(queue.put_nowait, (index, image))

            return Commission(drawing, preview, rows)

        commissions = [commission(index, *one) for index, one in enumerate(wanted)]
        async with self._engine.drawings.reserve(len(commissions)):
            work = asyncio.create_task(self._engine.drawings.submit(commissions))
            work.add_done_callback(lambda _: queue.put_nowait(None))
            try:
                while (entry := await queue.get()) is not None:
                    yield entry[0], False, entry[1]
                for index, image in enumerate(work.result()):
                    yield index, True, image
            finally:
                work.cancel()
                for one in commissions:
                    one.gone = True

    async def caption(self, images: list[Image.Image], language: str | None, by: Writer) -> list[str]:
        return await self._task(lambda: self._pipeline.caption(images, language, by))

    async def rerank(self, prompt: str, images: list[Image.Image], by: Judge) -> list[float]:
        return await self._task(lambda: self._pipeline.rerank(prompt, images, by))

    async def upscale(self, images: list[Image.Image], prompt: str | None, seed: int | None) -> list[Image.Image]:
        return await self._task(lambda: self._pipeline.upscale(images, prompt, seed))

    async def _task(self, job: Callable[[], Any]) -> Any:
        return await self._engine.run_task(self._engine.tasks, job)


class RemotePipeline(Pipeline):
    """The part of `Pipeline` that the service uses, for generators behind `handle`. It has no weights.

    `plan` and the checks work as ever; `caption`, `rerank` and `upscale` wait for an answer and are called in threads;
    drawings go through `RemoteDrawings`.
    """

    def __init__(self, handle: DeploymentHandle[Any], described: Described) -> None:
        self.handle = handle
        self.source, self.config, self.grid = described.source, described.config, described.grid

    def caption(
        self,
        images: Sequence[Image.Image],
        language: str | None = None,
        by: Writer = "auto",
        on_step: Callable[[], None] | None = None,
    ) -> list[str]:
        """`on_step` is called while the generator works: what it raises cancels the call if it has not begun."""
        response = self.handle.caption.remote(list(images), language, by)
        with _losses_told():
            told: list[str] = response.result() if on_step is None else _watched(response, on_step)
            return told

    def rerank(self, prompt: str, images: Sequence[Image.Image], by: Judge = "caption") -> list[float]:
        with _losses_told():
            scores: list[float] = self.handle.rerank.remote(prompt, list(images), by).result()
            return scores

    def upscale(
        self, images: Sequence[Image.Image], prompt: str | None = None, seed: int | None = None
    ) -> list[Image.Image]:
        with _losses_told():
            larger: list[Image.Image] = self.handle.upscale.remote(list(images), prompt, seed).result()
            return larger


class RemoteDrawings(Batcher[Commission, Any]):
    """The queue for drawings: those of one request go to one generator, which draws them with other requests'."""

    def __init__(self, handle: DeploymentHandle[Any], limit: int) -> None:
        super().__init__("drawings", lambda items: [], max_batch=1, limit=limit)
        self._handle = handle

    async def submit(self, items: Sequence[Commission]) -> list[Any]:
        """See `Batcher.submit`; when this is cancelled, the generator stops."""
        started = time.perf_counter()
        wanted: list[Wanted] = [(one.drawing, one.preview_rows if one.preview else frozenset()) for one in items]
        drawn: list[Image.Image] = []
        response = self._handle.options(stream=True).draw.remote(wanted)
        try:
            with _losses_told():
                async for index, done, image in response:  # type: ignore[union-attr]  # a generator, if asked to stream
                    preview = items[index].preview
                    if done:
                        drawn.append(image)
                    elif preview is not None:
                        preview(image)
        finally:
            response.cancel()
        self._note(len(items), time.perf_counter() - started)
        return drawn


class FrontEngine(Engine):
    """An engine whose pipeline, if any, is a `RemotePipeline` of `generators` replicas."""

    def __init__(self, served: Served, config: ServiceConfig, metrics: Metrics, generators: int) -> None:
        self._generators = generators
        super().__init__(served, config, metrics)

    def _drawing_queue(self, watch: Watch) -> Batcher[Commission, Any]:
        if not isinstance(self.served.pipeline, RemotePipeline):
            return super()._drawing_queue(watch)
        return RemoteDrawings(self.served.pipeline.handle, self.config.waiting_drawings)

    def _task_queue(self, watch: Watch) -> Batcher[Callable[[], Any], Any]:
        # a thread that waits for each generator
        return Batcher(
            "tasks", call_jobs, max_batch=1, limit=self.config.waiting_tasks, workers=self._generators, watch=watch
        )


def _watched(response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any], on_step: Callable[[], None]) -> Any:
    try:
        while True:
            on_step()
            with suppress(TimeoutError):
                return response.result(timeout_s=LOOK_AGAIN)
    finally:
        response.cancel()


@contextmanager
def _losses_told() -> Iterator[None]:
    """`Lost` for a replica that ended or does not come; what the generator itself raised stays."""
    try:
        yield
    except (RayActorError, RayServeException) as error:
        raise Lost("a replica of the generator was lost: try again") from error
