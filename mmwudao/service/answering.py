"""What all routes share: the models behind a request, deadlines, clients that leave, and JSON responses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel, TypeAdapter

from mmwudao.service import schemas
from mmwudao.service.errors import ClientGone, DeadlineExceeded, ServiceError
from mmwudao.service.inputs import InputDecoder
from mmwudao.service.queues import Served, ServiceQueues
from mmwudao.service.settings import ServiceConfig

T = TypeVar("T")

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": schemas.Error, "description": "The request cannot be answered as it is; 429: not now."},
    "5XX": {"model": schemas.Error, "description": "Not the client's fault; 504: the deadline has passed."},
}

ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)

prompts_log = logging.getLogger("mmwudao.service.prompts")


@dataclass(frozen=True)
class Backend:
    """What the routes work with."""

    queues: ServiceQueues
    decoder: InputDecoder
    created: int  # seconds since 1970, when the server was started

    @property
    def served(self) -> Served:
        return self.queues.served

    @property
    def config(self) -> ServiceConfig:
        return self.queues.config

    def log_prompt(self, what: str, text: str) -> None:
        """Log what a client wrote, if the operator asked for it."""
        if self.config.log_prompts:
            prompts_log.info("%s: %r", what, text)


# a coroutine, though nothing waits in it: FastAPI calls a plain function in a thread
async def backend_of(request: Request) -> Backend:
    """A dependency of routes."""
    backend: Backend = request.app.state.backend
    return backend


TheBackend = Annotated[Backend, Depends(backend_of)]


async def answer_in_time(request: Request, work: Awaitable[T], seconds: float) -> T:
    """The result of `work`, which is cancelled when the client leaves or the time is up.

    The request's body must have been read. Raises `ClientGone`, `DeadlineExceeded`, and what `work` raises.
    """
    # `work` runs in the request's own task: a task of its own would cost more
    task = asyncio.current_task()
    assert task is not None
    gone = asyncio.create_task(_cancel_when_gone(request, task))
    try:
        async with asyncio.timeout(seconds) as clock:
            return await work
    except TimeoutError as error:
        if clock.expired():
            raise DeadlineExceeded(f"not done within {seconds:g} s") from error
        raise
    except asyncio.CancelledError as error:
        if gone.done() and not gone.cancelled():
            task.uncancel()
            raise ClientGone("the client has left") from error
        raise
    finally:
        gone.cancel()


async def _cancel_when_gone(request: Request, task: asyncio.Task[Any]) -> None:
    """Cancel `task` when the client leaves, or when a body that no route reads does not arrive as announced."""
    with contextlib.suppress(ServiceError):
        while (await request.receive())["type"] != "http.disconnect":
            pass
    task.cancel()


def json_response(answer: BaseModel | dict[str, Any]) -> Response:
    """`answer` as JSON, by pydantic's serialiser, which is fast with vectors."""
    content = answer.model_dump_json() if isinstance(answer, BaseModel) else ANYTHING.dump_json(answer)
    return Response(content, media_type="application/json")
