"""A generator whose work is done by the replicas of Ray Serve: the worker in a replica, and the client of it.

Keys, limits and routes are those of one server; only drawings and tasks leave its process. Each server also admits
what it sends, so that a full queue is a 429 at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException

from generation.captions import OnStep
from mmwudao.asking import Answer, Asking, ask_picture
from mmwudao.canvas import Canvas, CanvasFormat
from mmwudao.loading.model_dir import ModelConfig
from mmwudao.pipeline import Pipeline
from mmwudao.planning import Drawing
from mmwudao.service.batching import Watch, WorkQueue
from mmwudao.service.draw_requests import DrawRequest, until_gone
from mmwudao.service.errors import ReplicaLost, ServiceError, refusals
from mmwudao.service.generators import DrawingQueue, LocalGenerator
from mmwudao.service.metrics import Metrics
from mmwudao.service.queues import Served, ServiceQueues
from mmwudao.service.settings import ServiceConfig
from mmwudao.tasks import Judge

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

T = TypeVar("T")

POLL_SECONDS = 0.5  # how often a waiting call looks whether its client has left
# a drawing, the rows of codes after which a preview is sent, and what it completes: one object in all of a request
Wanted = tuple[Drawing, frozenset[int], Canvas | None]


@dataclass(frozen=True)
class GeneratorDescription:
    """What a server must know of a generator to check requests for it."""

    source: str
    config: ModelConfig
    grid: tuple[int, int]
    canvas_format: CanvasFormat
    reads: int  # a text of so many bytes is read whole


class GeneratorWorker:
    """The queues for drawings and tasks in front of a pipeline, called from other processes.

    A user's mistake leaves it as a `ServiceError`. Create it inside the event loop that it is used in.
    """

    def __init__(self, name: str, pipeline: Pipeline, config: ServiceConfig, metrics: Metrics | None = None) -> None:
        self._pipeline = pipeline
        self._queues = ServiceQueues(Served(name, generator=LocalGenerator(pipeline)), config, metrics or Metrics())
        self._queues.start()

    async def describe(self) -> GeneratorDescription:
        pipeline = self._pipeline
        sizes = pipeline.grid, pipeline.canvas_format
        return GeneratorDescription(pipeline.source, pipeline.config, *sizes, pipeline.reads_surely)

    async def draw(self, wanted: Sequence[Wanted]) -> AsyncGenerator[tuple[int, bool, Image.Image]]:
        """Previews (False), then the pictures (True), each with its index; closing the generator stops the drawing."""
        loop, previews = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Image.Image] | None]()

        def draw_request(index: int, drawing: Drawing, rows: frozenset[int], canvas: Canvas | None) -> DrawRequest:
            def preview(image: Image.Image) -> None:
                loop.call_soon_threadsafe(previews.put_nowait, (index, image))

            return DrawRequest(drawing, preview, rows, canvas=canvas)

        requests = [draw_request(index, *one) for index, one in enumerate(wanted)]
        async with self._queues.drawings.reserve(len(requests)):
            work = asyncio.create_task(self._queues.drawings.submit(requests))
            work.add_done_callback(lambda _: previews.put_nowait(None))
            try:
                while (entry := await previews.get()) is not None:
                    yield entry[0], False, entry[1]
                with refusals():
                    images = work.result()
                for index, image in enumerate(images):
                    yield index, True, image
            finally:
                work.cancel()
                for one in requests:
                    one.gone = True

    async def read_part(self, text: str) -> str | None:
        return self._pipeline.read_part(text)

    async def caption(self, images: list[Image.Image], language: str | None) -> list[str]:
        return await self._run(lambda on_step: self._pipeline.caption(images, language, on_step=on_step))

    async def ask(self, image: Image.Image, asking: Asking) -> list[Answer]:
        return await self._run(lambda on_step: ask_picture(self._pipeline, image, asking, on_step))

    async def rerank(self, prompt: str, images: list[Image.Image], by: Judge) -> list[float]:
        return await self._run(lambda on_step: self._pipeline.rerank(prompt, images, by, on_step))

    async def upscale(self, images: list[Image.Image]) -> list[Image.Image]:
        return await self._run(lambda on_step: self._pipeline.upscale(images, on_step=on_step))

    async def _run(self, job: Callable[[OnStep], T]) -> T:
        """The result of `job`, which ends at its next step once this is cancelled."""
        gone, on_step = until_gone()
        try:
            with refusals():
                return await self._queues.run_job(self._queues.tasks, lambda: job(on_step))
        finally:
            gone.set()


class RemoteGenerator:
    """A `mmwudao.service.generators.Generator` behind a handle of Ray Serve, to `replicas` workers."""

    def __init__(self, handle: DeploymentHandle[Any], description: GeneratorDescription, replicas: int) -> None:
        self._handle = handle
        self.source, self.config, self.grid = description.source, description.config, description.grid
        self.canvas_format, self._reads = description.canvas_format, description.reads
        self.concurrent_tasks = replicas  # a thread that waits for each

    def drawing_queue(self, config: ServiceConfig, watch: Watch) -> DrawingQueue:
        """`watch` is told nothing: batches are made in the replicas."""
        return RemoteDrawings(self._handle, config.waiting_drawings)

    def read_part(self, text: str) -> str | None:
        if len(text.encode()) <= self._reads:
            return None
        with _errors_of_replica():
            read: str | None = self._handle.read_part.remote(text).result()
            return read

    # `on_step` is called while the replica works: an exception it raises cancels the call there, too
    def caption(self, images: Sequence[Image.Image], language: str | None, on_step: OnStep) -> list[str]:
        with _errors_of_replica():
            told: list[str] = _poll(self._handle.caption.remote(list(images), language), on_step)
            return told

    def ask(self, image: Image.Image, asking: Asking, on_step: OnStep) -> list[Answer]:
        with _errors_of_replica():
            answers: list[Answer] = _poll(self._handle.ask.remote(image, asking), on_step)
            return answers

    def rerank(self, prompt: str, images: Sequence[Image.Image], by: Judge, on_step: OnStep) -> list[float]:
        with _errors_of_replica():
            scores: list[float] = _poll(self._handle.rerank.remote(prompt, list(images), by), on_step)
            return scores

    def upscale(self, images: Sequence[Image.Image], on_step: OnStep) -> list[Image.Image]:
        with _errors_of_replica():
            larger: list[Image.Image] = _poll(self._handle.upscale.remote(list(images)), on_step)
            return larger


class RemoteDrawings(WorkQueue[DrawRequest, Image.Image]):
    """The queue for drawings. Those of one request go to one replica, which draws them with other requests'."""

    def __init__(self, handle: DeploymentHandle[Any], limit: int) -> None:
        super().__init__("drawings", limit)
        self._handle = handle

    def start(self) -> None:
        """Nothing to begin: the replicas run."""

    async def submit(self, items: Sequence[DrawRequest]) -> list[Image.Image]:
        """See `WorkQueue.submit`; when this is cancelled, the replica stops drawing."""
        started = time.perf_counter()
        wanted: list[Wanted] = [
            (one.drawing, one.preview_rows if one.preview else frozenset(), one.canvas) for one in items
        ]
        drawn: list[Image.Image] = []
        response = self._handle.options(stream=True).draw.remote(wanted)
        try:
            with _errors_of_replica():
                async for index, done, image in response:  # type: ignore[union-attr]  # with stream=True it iterates
                    preview = items[index].preview
                    if done:
                        drawn.append(image)
                    elif preview is not None:
                        preview(image)
        finally:
            response.cancel()
        self._record(len(items), time.perf_counter() - started)
        return drawn


def _poll(response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any], on_step: OnStep) -> Any:
    try:
        while True:
            on_step()
            with suppress(TimeoutError):
                return response.result(timeout_s=POLL_SECONDS)
    finally:
        response.cancel()


@contextmanager
def _errors_of_replica() -> Iterator[None]:
    """Raise a `ServiceError` of the replica as it was raised there, and `ReplicaLost` when the replica ended."""
    try:
        yield
    except RayTaskError as error:
        # Ray's wrapper has a traceback for a message
        if isinstance(error.cause, ServiceError):
            raise error.cause from error
        raise
    except (RayActorError, RayServeException) as error:
        raise ReplicaLost("a replica of the generator was lost: try again") from error
