"""Errors as clients read them: in the form of OpenAI's API, and never with a traceback.

`as_http_error` is the one place that decides what an exception is answered with: routes, streams and the replicas of
Ray Serve all use it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi import Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from data.images import ImageTooLarge
from generation.drawing.memory import NotEnoughMemory
from mmwudao.service.wording import describe_mistake
from retrieval.collections.base import ExistingIdsError

OUR_PACKAGES = frozenset({"data", "vqvae", "generation", "retrieval", "mmwudao"})


class ServiceError(HTTPException):
    """An answer other than the one asked for: one line for the client, and an HTTP status.

    An `HTTPException`, because FastAPI lets no other pass while it reads a body.
    """

    status = 400
    kind = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(self.status, message, headers={})
        self.param, self.code = param, code

    def __str__(self) -> str:
        return str(self.detail)


class BadInput(ServiceError):
    """The request cannot be answered as it is."""


class Unauthorized(ServiceError):
    """No key, or one that is not known."""

    status = 401

    def __init__(self, message: str) -> None:
        super().__init__(message, code="invalid_api_key")
        self.headers = {"WWW-Authenticate": "Bearer"}


class Forbidden(ServiceError):
    """The request comes under a host name that is not allowed."""

    status = 403


class NotFound(ServiceError):
    """This server has no such item, model or ability."""

    status = 404


class BodyTimeout(ServiceError):
    """The body did not arrive in time."""

    status = 408

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers = {"Connection": "close"}  # or the rest of the body would be waited for


class Conflict(ServiceError):
    """An item to be added exists already."""

    status = 409


class TooLarge(ServiceError):
    """The request exceeds a limit on bytes or pixels."""

    status = 413


class ClientGone(ServiceError):
    """The client left before the answer. The status is nginx's."""

    status = 499


class QueueFull(ServiceError):
    """A queue, or the service, is full: try again after `retry_after` seconds."""

    status = 429
    kind = "rate_limit_error"

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message, code="overloaded")
        self.headers = {"Retry-After": str(retry_after)}


class Unavailable(ServiceError):
    """The server cannot answer now, through no fault of the client's."""

    status = 503
    kind = "server_error"


class ReplicaLost(Unavailable):
    """A replica of Ray Serve ended under a request."""


class DeadlineExceeded(ServiceError):
    """The request was accepted, but not done by the deadline."""

    status = 504
    kind = "timeout_error"


class ClientsGone(Exception):
    """All clients that waited for a picture or a caption have left."""


UNREADABLE_TO_FASTAPI = "There was an error parsing the body"
_UNREADABLE = BadInput("the body cannot be read: send JSON in UTF-8, not compressed, and not nested a thousand deep")


def as_http_error(error: Exception) -> HTTPException:
    """What the client is told of an exception: a user's mistake is a 4xx, anything unexpected a 500 without details."""
    if type(error) is HTTPException and error.detail == HTTPStatus(error.status_code).phrase:
        return _in_words(error)
    if isinstance(error, HTTPException):
        return _UNREADABLE if error.detail == UNREADABLE_TO_FASTAPI else error
    if isinstance(error, RequestValidationError):
        return invalid(error)
    if isinstance(error, ValueError) and is_users_mistake(error):
        return refusal(error)
    return HTTPException(500, "the server failed")


def _in_words(error: HTTPException) -> HTTPException:
    """The framework's own answer, which is the name of its status, as one that says what to do."""
    told = error.detail
    if error.status_code == 404:
        told = "there is no such address here: /docs lists those that there are"
    elif error.status_code == 405:
        told = f"this address takes {(error.headers or {}).get('Allow', 'another method')}"
    return HTTPException(error.status_code, told, error.headers)


def is_users_mistake(error: ValueError) -> bool:
    """Whether our own code raised this: there a `ValueError` means bad input. One that a library raised is our bug."""
    if type(error).__module__.partition(".")[0] in OUR_PACKAGES:
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return str(module).partition(".")[0] in OUR_PACKAGES


def refusal(error: ValueError, param: str | None = None) -> ServiceError:
    """The 4xx for a user's mistake in the field `param` of the request, with the message of `error`.

    Too little memory is the operator's affair: 503.
    """
    if isinstance(error, NotEnoughMemory):
        return Unavailable("the server has too little memory left: try again later")
    kind: type[ServiceError] = BadInput
    if isinstance(error, ImageTooLarge):
        kind = TooLarge
    elif isinstance(error, ExistingIdsError):
        kind = Conflict
    return kind(str(error), param=param)


@contextmanager
def refusals(param: str | None = None) -> Iterator[None]:
    """A user's mistake inside raises a `ServiceError` that names the field `param` of the request."""
    try:
        yield
    except ValueError as error:
        if not is_users_mistake(error):
            raise
        raise refusal(error, param) from error


def error_record(error: HTTPException) -> dict[str, Any]:
    """The JSON of an error as OpenAI's clients read it."""
    kind = getattr(error, "kind", "invalid_request_error" if error.status_code < 500 else "server_error")
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return {"error": {"message": str(error.detail), "type": kind, "param": param, "code": code}}


def error_response(error: HTTPException) -> Response:
    """The response for an error of ours or of the framework."""
    # ASCII: what a client sent may hold lone surrogates, which UTF-8 cannot
    return Response(json.dumps(error_record(error)), error.status_code, error.headers, "application/json")


def invalid(error: RequestValidationError | ValidationError, sent: object = None) -> BadInput:
    """What is wrong with a request, in words and without what was sent; `sent` is the body, where it was parsed."""
    if isinstance(error, RequestValidationError):
        sent = error.body
    message, field = describe_mistake(error.errors(), sent)
    return BadInput(message, param=field)
