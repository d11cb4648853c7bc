"""What all routes share: the engine behind a request, deadlines, clients that leave, and what a picture is sent as."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, TypeAdapter

from mmwudao.service import schemas
from mmwudao.service.errors import ClientGone, Late, ServiceError
from mmwudao.service.incoming import Incoming
from mmwudao.service.queues import Engine

T = TypeVar("T")

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": schemas.Error, "description": "The request cannot be answered as it is; 429: now."},
    "5XX": {"model": schemas.Error, "description": "Not the client's fault; 504: the deadline has passed."},
}

ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)

prompts_log = logging.getLogger("mmwudao.service.prompts")


# dependencies are coroutines, though nothing waits in them: FastAPI calls a plain function in a thread
async def engine_of(request: Request) -> Engine:
    """A dependency of routes."""
    engine: Engine = request.app.state.engine
    return engine


async def incoming_of(request: Request) -> Incoming:
    """A dependency of routes."""
    incoming: Incoming = request.app.state.incoming
    return incoming


async def answer_in_time(request: Request, work: Awaitable[T], seconds: float) -> T:
    """The result of `work`, which is cancelled when the client leaves (`ClientGone`) or time is up (`Late`).

    The request's body must have been read.
    """
    # `work` runs in the request's own task, which costs less than one for it
    task = asyncio.current_task()
    assert task is not None
    gone = asyncio.create_task(_gone(request, task))
    try:
        async with asyncio.timeout(seconds) as clock:
            return await work
    except TimeoutError as error:
        if clock.expired():
            raise Late(f"not done within {seconds:g} s") from error
        raise
    except asyncio.CancelledError as error:
        if gone.done() and not gone.cancelled():
            task.uncancel()
            raise ClientGone("the client has left") from error
        raise
    finally:
        gone.cancel()


async def _gone(request: Request, task: asyncio.Task[Any]) -> None:
    """Cancel `task` when the client leaves, or does not send what it announced though nothing asks for it."""
    with contextlib.suppress(ServiceError):
        while (await request.receive())["type"] != "http.disconnect":
            pass
    task.cancel()


def json_response(answer: BaseModel | dict[str, Any]) -> Response:
    """`answer` as JSON, by pydantic's serialiser, which is quick with vectors."""
    content = answer.model_dump_json() if isinstance(answer, BaseModel) else ANYTHING.dump_json(answer)
    return Response(content, media_type="application/json")


def log_prompt(engine: Engine, what: str, text: str) -> None:
    """What clients wrote goes to the log only where the operator asked for it."""
    if engine.config.log_prompts:
        prompts_log.info("%s: %r", what, text)
