"""`/v1/images/generations` as OpenAI has it, captions, and which picture shows a text best."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from PIL import Image
from starlette.types import Receive, Scope, Send

from mmwudao import planning
from mmwudao.canvas import Canvas
from mmwudao.pictures import encode_png
from mmwudao.planning import Drawing, check_prompt
from mmwudao.service import schemas
from mmwudao.service.answering import ERRORS, Backend, TheBackend, answer_in_time, json_response
from mmwudao.service.draw_requests import DrawRequest, rows_of_previews, until_gone
from mmwudao.service.errors import BadInput, DeadlineExceeded, as_http_error, error_record, refusals
from mmwudao.service.inputs import Part
from mmwudao.service.routes_embeddings import embed
from mmwudao.tasks import check_describes, check_judge

T = TypeVar("T")

router = APIRouter(responses=ERRORS, tags=["pictures"])
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PictureOrder:
    """The pictures that one request wants; all complete the `canvas`, if there is one."""

    drawings: list[Drawing]
    doubled: bool
    told: dict[str, str]  # of each picture in the answer
    canvas: Canvas | None = None
    events: Literal["image_generation", "image_edit"] = "image_generation"

    @property
    def requests(self) -> list[DrawRequest]:
        return [DrawRequest(one, canvas=self.canvas) for one in self.drawings]


@router.post(
    "/v1/images/generations",
    response_model=schemas.ImagesResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def generations(body: schemas.GenerationRequest, request: Request, backend: TheBackend) -> Response:
    """Pictures of a prompt. The same prompt, options and seed give the same picture, whatever other clients ask for.

    With `stream`, server-sent events as of OpenAI: image_generation.partial_image, white below what is drawn so far,
    and image_generation.completed; `index` says which of n pictures.
    """
    return await answer_order(body, await take_order(body, backend), request, backend)


async def take_order(body: schemas.GenerationRequest, backend: Backend) -> PictureOrder:
    """What to draw, and whether to double its size. Raises `ValueError`."""
    backend.queues.check_model(body.model)
    drawings, doubled = _plan(body, backend)
    backend.log_prompt("prompt", body.prompt)
    # what the model reads of a prompt that is too long for it
    read = await asyncio.to_thread(backend.queues.generator.read_part, drawings[0].text)
    return PictureOrder(drawings, doubled, {} if read is None else {"revised_prompt": read})


async def answer_order(
    body: schemas.GenerationRequest, order: PictureOrder, request: Request, backend: Backend
) -> Response:
    """The pictures, at once or as a stream of events."""
    if body.stream:
        events = _events(body, backend, order)
        return EventStream(await anext(events), events)  # a full queue is still a 429
    images = await answer_in_time(request, _draw(backend, order), backend.config.drawing_deadline)
    pairs = zip(images, order.drawings, strict=True)
    data = [{"b64_json": _base64(image), "seed": one.seed, **order.told} for image, one in pairs]
    answer = {"created": int(time.time()), "data": data, "size": _size(images[0]), "output_format": "png"}
    return json_response(answer)


def _plan(body: schemas.GenerationRequest, backend: Backend) -> tuple[list[Drawing], bool]:
    config = backend.queues.generator.config
    own = config.image_size
    sizes = {"auto": False, f"{own}x{own}": False}
    if "upscaler" in config.parts:
        sizes[f"{2 * own}x{2 * own}"] = True
    if (body.size or "auto") not in sizes:
        raise BadInput(f"this model draws in these sizes: {', '.join(sizes)}", param="size")
    if body.n > backend.config.max_pictures:
        raise BadInput(f"at most {backend.config.max_pictures} pictures in one request", param="n")
    with refusals("prompt"):
        check_prompt(body.prompt)
    with refusals("style"):
        planning.styled_text(config, body.prompt, body.style)
    drawings = planning.plan(config, body.prompt, body.n, body.seed, body.style, body.sampling)
    return drawings, sizes[body.size or "auto"]


async def _draw(backend: Backend, order: PictureOrder) -> list[Image.Image]:
    """The pictures. Raises `QueueFull`."""
    async with backend.queues.drawings.reserve(len(order.drawings)):
        return await _draw_reserved(backend, order.requests, order.doubled)


async def _draw_reserved(backend: Backend, requests: list[DrawRequest], doubled: bool) -> list[Image.Image]:
    """The pictures, for which room is reserved; when this is cancelled, drawing stops."""
    queues = backend.queues
    try:
        images = await queues.drawings.submit(requests)
    finally:
        for one in requests:
            one.gone = True
    if not doubled:
        return images
    gone, on_step = until_gone()
    try:
        return await queues.run_job(queues.tasks, lambda: _double(backend, images, on_step))
    finally:
        gone.set()


def _double(backend: Backend, images: list[Image.Image], on_step: Callable[[], None]) -> list[Image.Image]:
    larger = backend.queues.generator.upscale(images, on_step)
    for small, large in zip(images, larger, strict=True):
        large.info = {**small.info, **large.info}
    return larger


class EventStream(StreamingResponse):
    """Server-sent events from a generator, which is closed also when the client leaves."""

    def __init__(self, first: bytes, events: AsyncGenerator[bytes]) -> None:
        async def all_events() -> AsyncGenerator[bytes]:
            yield first
            async for event in events:
                yield event

        super().__init__(all_events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def _events(body: schemas.GenerationRequest, backend: Backend, order: PictureOrder) -> AsyncGenerator[bytes]:
    """A comment once room is reserved (else `QueueFull`), then previews and the pictures, or an error instead."""
    loop, previews = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Image.Image] | None]()
    height, width = backend.queues.generator.grid
    if order.canvas is not None:
        height -= -(-order.canvas.known // width)
    rows = rows_of_previews(body.partial_images or 0, height)
    drawings, kind = order.drawings, order.events

    def draw_request(index: int, drawing: Drawing) -> DrawRequest:
        def preview(image: Image.Image) -> None:
            loop.call_soon_threadsafe(previews.put_nowait, (index, image))

        return DrawRequest(drawing, preview, rows, canvas=order.canvas)

    seconds = backend.config.drawing_deadline
    end = loop.time() + seconds
    async with backend.queues.drawings.reserve(len(drawings)):
        yield b": accepted\n\n"
        requests = [draw_request(k, one) for k, one in enumerate(drawings)]
        work = asyncio.create_task(_draw_reserved(backend, requests, order.doubled))
        work.add_done_callback(lambda _: previews.put_nowait(None))
        shown = [0] * len(drawings)
        try:
            # not asyncio.timeout: the framework may resume a generator in another task
            while (entry := await asyncio.wait_for(previews.get(), end - loop.time())) is not None:
                index, image = entry
                yield _event(f"{kind}.partial_image", image, index, partial_image_index=shown[index])
                shown[index] += 1
            for index, (image, drawing) in enumerate(zip(work.result(), drawings, strict=True)):
                yield _event(f"{kind}.completed", image, index, seed=drawing.seed, **order.told)
        except TimeoutError:
            yield _error_event(DeadlineExceeded(f"not done within {seconds:g} s"))
        except Exception as error:
            yield _error_event(error)
        finally:
            work.cancel()


def _event(kind: str, image: Image.Image, index: int, **more: int | str) -> bytes:
    record: dict[str, Any] = {
        "type": kind,
        "b64_json": _base64(image),
        "created_at": int(time.time()),
        "size": _size(image),
        "output_format": "png",
        "background": "opaque",
        "quality": "auto",
        "index": index,
        **more,
    }
    return f"event: {record['type']}\ndata: {json.dumps(record)}\n\n".encode()


def _error_event(error: Exception) -> bytes:
    """The status 200 has been sent, so the error is an event of the stream."""
    told = as_http_error(error)
    if told.status_code == 500:
        log.error("a stream of pictures failed", exc_info=error)  # the framework does not see it
    return f"event: error\ndata: {json.dumps(error_record(told))}\n\n".encode()


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _base64(image: Image.Image) -> str:
    return base64.b64encode(encode_png(image)).decode()


@router.post("/v1/captions", response_model=schemas.CaptionList)
async def captions(body: schemas.CaptionRequest, request: Request, backend: TheBackend) -> Response:
    """What pictures show, in one of the model's languages."""
    backend.queues.check_model(body.model)
    generator = backend.queues.generator
    check_describes(generator)
    sources = _sources(body.images, backend, "images")
    languages = generator.config.languages
    language = body.language if body.language is not None else next(iter(languages), None)
    if language is not None and language not in languages:
        known = ", ".join(languages) or "one language, which is not named: leave it out"
        raise BadInput(f"this model describes in: {known}", param="language")

    def describe(images: list[Image.Image], on_step: Callable[[], None]) -> list[str]:
        return generator.caption(images, language, on_step)

    work = run_task(backend, sources, describe, places("images", sources))
    told = await answer_in_time(request, work, backend.config.drawing_deadline)
    data = [schemas.PictureCaption(index=k, language=language, caption=caption) for k, caption in enumerate(told)]
    return json_response(schemas.CaptionList(data=data, model=backend.served.name))


@router.post("/v1/rerank", response_model=schemas.RerankResponse)
async def rerank(body: schemas.RerankRequest, request: Request, backend: TheBackend) -> Response:
    """Which pictures show a text best: by the log probability of the text as their caption, by towers, or both."""
    backend.queues.check_model(body.model)
    with refusals("query"):
        check_prompt(body.query)
    backend.log_prompt("query", body.query)
    sources = _sources(body.documents, backend, "documents")
    if (body.by or "towers") == "towers" and backend.served.towers is not None:
        scores = await answer_in_time(request, _score_by_towers(body.query, sources, backend), backend.config.deadline)
    else:
        generator, by = backend.queues.generator, body.by or "caption"
        with refusals("by"):
            check_judge(generator, by)

        def judge(images: list[Image.Image], on_step: Callable[[], None]) -> list[float]:
            return generator.rerank(body.query, images, by, on_step)

        work = run_task(backend, sources, judge, places("documents", sources))
        scores = await answer_in_time(request, work, backend.config.drawing_deadline)
    ranked = sorted(range(len(scores)), key=lambda k: -scores[k])[: body.top_n]
    results = [schemas.Ranked(index=k, relevance_score=scores[k]) for k in ranked]
    return json_response(schemas.RerankResponse(results=results, model=backend.served.name))


async def _score_by_towers(query: str, sources: list[str], backend: Backend) -> list[float]:
    """The cosine of the query and each picture."""
    parts: list[Part] = [schemas.TextPart(text=query), *(schemas.ImagePart(image=source) for source in sources)]
    embedded = await embed(backend, parts, ["query", *places("documents", sources)])
    return [float(embedded[0].vector @ one.vector) for one in embedded[1:]]


def _sources(parts: Sequence[str | schemas.ImagePart], backend: Backend, param: str) -> list[str]:
    """The data URI or URL of each picture. Raises `BadInput` for too many."""
    backend.decoder.check_count(len(parts), backend.config.max_described, param)
    return [part.image if isinstance(part, schemas.ImagePart) else part for part in parts]


def places(param: str, sources: Sequence[str]) -> list[str]:
    """The name of each picture in the request."""
    return [f"{param}[{k}]" for k in range(len(sources))]


async def run_task(
    backend: Backend,
    sources: list[str],
    task: Callable[[list[Image.Image], Callable[[], None]], list[T]],
    params: Sequence[str],
) -> list[T]:
    """The result of `task` for the pictures, in the queue for tasks. Raises `ServiceError`s that name one of `params`.

    `task(images, on_step)` calls `on_step` at every step, which raises `ClientsGone` once the client has left.
    """
    queues = backend.queues
    gone, on_step = until_gone()
    async with queues.tasks.reserve(1), queues.decoded_tasks:
        images = await backend.decoder.pictures(sources, lambda image: image, params)
        try:
            result: list[T] = (await queues.tasks.submit([lambda: task(images, on_step)]))[0]
        finally:
            gone.set()
        return result
