"""`/v1/images/generations` as OpenAI has it, captions, and which picture shows a text best."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from mmwudao.pictures import encode_png
from mmwudao.pipeline import Drawing, check_prompt
from mmwudao.service import schemas
from mmwudao.service.answering import ERRORS, answer_in_time, engine_of, incoming_of, json_response, log_prompt
from mmwudao.service.drawing import Commission, NobodyWaits, rows_of_previews
from mmwudao.service.errors import BadInput, Late, error_record
from mmwudao.service.incoming import Incoming, Part
from mmwudao.service.queues import Engine
from mmwudao.service.routes_embeddings import embed
from mmwudao.tasks import check_judge

T = TypeVar("T")

router = APIRouter(responses=ERRORS, tags=["pictures"])
log = logging.getLogger(__name__)


@router.post(
    "/v1/images/generations",
    response_model=schemas.ImagesAnswer,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def generations(
    body: schemas.GenerationRequest, request: Request, engine: Annotated[Engine, Depends(engine_of)]
) -> Response:
    """Pictures of a prompt. The same prompt, options and seed give the same picture, whoever else is served.

    With `stream`, server-sent events as of OpenAI: image_generation.partial_image, white below what is drawn so far,
    and image_generation.completed; `index` says which of n pictures.
    """
    engine.check_model(body.model)
    drawings, doubled = _plan(body, engine)
    log_prompt(engine, "prompt", body.prompt)
    if body.stream:
        events = _events(body, engine, drawings, doubled)
        return EventStream(await anext(events), events)  # a full queue is still a 429
    work = _draw(engine, [Commission(one) for one in drawings], doubled)
    images = await answer_in_time(request, work, engine.config.drawing_deadline)
    data = [{"b64_json": _base64(image), "seed": one.seed} for image, one in zip(images, drawings, strict=True)]
    answer = {"created": int(time.time()), "data": data, "size": _size(images[0]), "output_format": "png"}
    return json_response(answer)


def _plan(body: schemas.GenerationRequest, engine: Engine) -> tuple[list[Drawing], bool]:
    """What to draw, and whether to double its size. Raises `BadInput`."""
    pipeline, own = engine.pipeline, engine.pipeline.config.image_size
    sizes = {"auto": False, f"{own}x{own}": False}
    if "upscaler" in pipeline.config.parts:
        sizes[f"{2 * own}x{2 * own}"] = True
    if (body.size or "auto") not in sizes:
        raise BadInput(f"this model draws in these sizes: {', '.join(sizes)}", param="size")
    if body.n > engine.config.max_pictures:
        raise BadInput(f"at most {engine.config.max_pictures} pictures in one request", param="n")
    try:
        drawings = pipeline.plan(body.prompt, body.n, body.seed, body.style, body.sampling)
    except ValueError as error:
        raise BadInput(str(error)) from error
    return drawings, sizes[body.size or "auto"]


async def _draw(engine: Engine, commissions: list[Commission], doubled: bool) -> list[Image.Image]:
    """The pictures. Raises `Busy`."""
    async with engine.drawings.reserve(len(commissions)):
        return await _drawn(engine, commissions, doubled)


async def _drawn(engine: Engine, commissions: list[Commission], doubled: bool) -> list[Image.Image]:
    """The pictures, for which there is room; when this is cancelled, their drawing stops."""
    try:
        images: list[Image.Image] = await engine.drawings.submit(commissions)
    finally:
        for one in commissions:
            one.gone = True
    return await engine.run_task(engine.tasks, lambda: _double(engine, images)) if doubled else images


def _double(engine: Engine, images: list[Image.Image]) -> list[Image.Image]:
    larger = engine.pipeline.upscale(images)
    for small, large in zip(images, larger, strict=True):
        large.info = {**small.info, **large.info}
    return larger


class EventStream(StreamingResponse):
    """Server-sent events of a generator, which is closed whatever becomes of the client."""

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


async def _events(
    body: schemas.GenerationRequest, engine: Engine, drawings: list[Drawing], doubled: bool
) -> AsyncGenerator[bytes]:
    """A comment when there is room in the queue (else `Busy`), previews, the pictures; or an error in their place."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Image.Image] | None]()
    rows = rows_of_previews(body.partial_images or 0, engine.pipeline.grid[0])

    def commission(index: int, drawing: Drawing) -> Commission:
        def preview(image: Image.Image) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, (index, image))

        return Commission(drawing, preview, rows)

    late = loop.time() + engine.config.drawing_deadline
    async with engine.drawings.reserve(len(drawings)):
        yield b": accepted\n\n"
        work = asyncio.create_task(_drawn(engine, [commission(k, one) for k, one in enumerate(drawings)], doubled))
        work.add_done_callback(lambda _: queue.put_nowait(None))
        shown = [0] * len(drawings)
        try:
            # not asyncio.timeout: the framework goes on with a generator in other tasks
            while (entry := await asyncio.wait_for(queue.get(), late - loop.time())) is not None:
                index, image = entry
                yield _event("partial_image", image, index, partial_image_index=shown[index])
                shown[index] += 1
            for index, (image, drawing) in enumerate(zip(work.result(), drawings, strict=True)):
                yield _event("completed", image, index, seed=drawing.seed)
        except TimeoutError:
            yield _error(Late(f"not done within {engine.config.drawing_deadline:g} s"))
        except HTTPException as error:
            yield _error(error)
        except Exception:
            log.exception("a stream of pictures failed")  # the status has been sent: the framework cannot say it
            yield _error(HTTPException(500, "the server failed"))
        finally:
            work.cancel()


def _event(kind: str, image: Image.Image, index: int, **more: int) -> bytes:
    record: dict[str, Any] = {
        "type": f"image_generation.{kind}",
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


def _error(error: HTTPException) -> bytes:
    record = error_record(str(error.detail), getattr(error, "kind", "server_error"))
    return f"event: error\ndata: {json.dumps(record)}\n\n".encode()


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _base64(image: Image.Image) -> str:
    return base64.b64encode(encode_png(image)).decode()


@router.post("/v1/captions", response_model=schemas.CaptionList)
async def captions(
    body: schemas.CaptionRequest,
    request: Request,
    engine: Annotated[Engine, Depends(engine_of)],
    incoming: Annotated[Incoming, Depends(incoming_of)],
) -> Response:
    """What pictures show, in one of the model's languages."""
    engine.check_model(body.model)
    pipeline, sources = engine.pipeline, _sources(body.images, engine, incoming, "images")
    languages = pipeline.config.languages
    language = body.language or languages[0]
    if language not in languages:
        raise BadInput(f"this model describes in: {', '.join(languages)}", param="language")

    def describe(images: list[Image.Image], on_step: Callable[[], None]) -> list[str]:
        return pipeline.caption(images, language, on_step=on_step)

    told = await answer_in_time(
        request, _about(engine, incoming, sources, describe, "images"), engine.config.drawing_deadline
    )
    data = [schemas.Caption(index=k, language=language, caption=caption) for k, caption in enumerate(told)]
    return json_response(schemas.CaptionList(data=data, model=engine.served.name))


@router.post("/v1/rerank", response_model=schemas.RerankAnswer)
async def rerank(
    body: schemas.RerankRequest,
    request: Request,
    engine: Annotated[Engine, Depends(engine_of)],
    incoming: Annotated[Incoming, Depends(incoming_of)],
) -> Response:
    """Which pictures show a text best: by the log probability of the text as their caption, by towers, or both."""
    engine.check_model(body.model)
    try:
        check_prompt(body.query)
    except ValueError as error:
        raise BadInput(str(error), param="query") from error
    log_prompt(engine, "query", body.query)
    sources = _sources(body.documents, engine, incoming, "documents")
    if (body.by or "towers") == "towers" and engine.served.towers is not None:
        parts: list[Part] = [
            schemas.TextPart(text=body.query),
            *(schemas.ImagePart(image=source) for source in sources),
        ]
        found = await answer_in_time(request, embed(engine, incoming, parts, "documents"), engine.config.deadline)
        scores = [float(found[0].vector @ one.vector) for one in found[1:]]
    else:
        pipeline, by = engine.pipeline, body.by or "caption"
        try:
            check_judge(pipeline, by)
        except ValueError as error:
            raise BadInput(str(error), param="by") from error

        def judge(images: list[Image.Image], on_step: Callable[[], None]) -> list[float]:
            on_step()
            return pipeline.rerank(body.query, images, by)

        work = _about(engine, incoming, sources, judge, "documents")
        scores = await answer_in_time(request, work, engine.config.drawing_deadline)
    ranked = sorted(range(len(scores)), key=lambda k: -scores[k])[: body.top_n]
    results = [schemas.Ranked(index=k, relevance_score=scores[k]) for k in ranked]
    return json_response(schemas.RerankAnswer(results=results, model=engine.served.name))


def _sources(parts: Sequence[str | schemas.ImagePart], engine: Engine, incoming: Incoming, param: str) -> list[str]:
    """Where each picture is. Raises `BadInput` for too many."""
    incoming.check_count(len(parts), engine.config.max_described, param)
    return [part.image if isinstance(part, schemas.ImagePart) else part for part in parts]


async def _about(
    engine: Engine,
    incoming: Incoming,
    sources: list[str],
    judge: Callable[[list[Image.Image], Callable[[], None]], list[T]],
    param: str,
) -> list[T]:
    """What `judge` says of the pictures, in the queue for tasks. Raises `ServiceError`s.

    `judge` gets a function to call at every step, which ends it when nobody waits any more.
    """
    gone = threading.Event()

    def on_step() -> None:
        if gone.is_set():
            raise NobodyWaits

    async with engine.tasks.reserve(1), engine.decoded_tasks:
        images = await incoming.pictures(sources, lambda image: image, param)
        try:
            told: list[T] = (await engine.tasks.submit([lambda: judge(images, on_step)]))[0]
        finally:
            gone.set()
        return told
