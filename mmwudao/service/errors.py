"""Errors that a client is told of, in the form of OpenAI's API, and never with a traceback."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException


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
    """Something in the request cannot be used."""


class Unauthorized(ServiceError):
    """No key, or one that is not known."""

    status = 401

    def __init__(self, message: str) -> None:
        super().__init__(message, code="invalid_api_key")
        self.headers = {"WWW-Authenticate": "Bearer"}


class Forbidden(ServiceError):
    """Asked from where nobody may ask."""

    status = 403


class NotFound(ServiceError):
    """No such item, model, or ability of this server."""

    status = 404


class Slow(ServiceError):
    """The body does not arrive."""

    status = 408

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers = {"Connection": "close"}  # or the rest of the body would be waited for


class Conflict(ServiceError):
    """What was to be added is there already."""

    status = 409


class TooLarge(ServiceError):
    """Beyond a cap on bytes or pixels."""

    status = 413


class ClientGone(ServiceError):
    """The client left; nobody reads the answer. The status is nginx's."""

    status = 499


class Busy(ServiceError):
    """A full queue: try again after `retry_after` seconds."""

    status = 429
    kind = "rate_limit_error"

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message, code="overloaded")
        self.headers = {"Retry-After": str(retry_after)}


class Late(ServiceError):
    """Accepted, but not done by the deadline."""

    status = 504
    kind = "timeout_error"


def error_record(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: HTTPException) -> Response:
    """The response for an error of ours or of the framework."""
    kind = getattr(error, "kind", "invalid_request_error" if error.status_code < 500 else "server_error")
    record = error_record(str(error.detail), kind, getattr(error, "param", None), getattr(error, "code", None))
    # ASCII: what a client sent may hold lone surrogates, which UTF-8 cannot
    return Response(json.dumps(record), error.status_code, error.headers, "application/json")


def invalid(error: RequestValidationError | ValidationError) -> BadInput:
    """The first thing that is wrong with a request, without what was sent."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
    return BadInput(f"{place}: {first['msg']}" if place else str(first["msg"]), param=place or None)
