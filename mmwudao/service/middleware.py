"""ASGI middleware around the application: it checks keys and bounds bodies, counts requests, and logs them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmwudao.service.errors import (
    BadInput,
    BodyTimeout,
    ClientGone,
    Forbidden,
    QueueFull,
    ServiceError,
    TooLarge,
    Unauthorized,
    error_response,
)
from mmwudao.service.keys import KeyRing, is_loopback
from mmwudao.service.metrics import Metrics
from mmwudao.service.settings import ServiceConfig

# these need no key: they hold nothing private
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json"})
OPEN_FOLDER = "/static-offline-docs/"  # the script and style of /docs

log = logging.getLogger("mmwudao.service.access")


class AdmissionMiddleware:
    """Admits requests. FastAPI reads a body before it calls any dependency, so no dependency could bound it."""

    def __init__(self, app: ASGIApp, config: ServiceConfig, metrics: Metrics) -> None:
        self._app, self.config, self._metrics = app, config, metrics
        self._keys = KeyRing(config.keys)
        self._requests = 0
        self._bodies = 0  # bytes of all requests being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = _RequestContext(self, scope, receive, send)
        inner = scope
        if scope["method"] == "HEAD":  # as GET, without the body (RFC 9110, section 9.3.2)
            inner = context.scope = {**scope, "method": "GET"}
        self._requests += 1
        self._metrics.in_flight.inc()
        try:
            try:
                self._admit(context)
                await self._app(inner, context.receive, context.send)
            except ServiceError as error:
                if context.status:
                    raise
                await error_response(error)(scope, receive, context.send)
        except Exception:
            context.failed = True  # the framework sends its answer outside this middleware
            raise
        finally:
            self._requests -= 1
            self._bodies -= context.held
            self._metrics.in_flight.dec()
            self._record(context)

    def _admit(self, context: _RequestContext) -> None:
        if context.scope["path"] in OPEN_PATHS or context.scope["path"].startswith(OPEN_FOLDER):
            return
        if self._keys:
            if not self._keys.accepts(context.header(b"authorization")):
                raise Unauthorized("a known key is needed: send it as 'Authorization: Bearer KEY'")
        elif not is_loopback(_host(context.header(b"host"))):
            # a web page may point a name of its own at this machine (DNS rebinding)
            raise Forbidden("without keys this service answers only to localhost")
        if self._requests > self.config.max_requests and context.scope["path"] != "/metrics":
            raise QueueFull(f"{self.config.max_requests} requests are being answered: try again later")
        length = context.header(b"content-length")
        if length:
            if not length.isdigit():
                raise BadInput("Content-Length must be a number")
            context.hold(int(length[:20]))
        backend = getattr(context.scope["app"].state, "backend", None)
        if backend is not None:
            content_type = context.header(b"content-type").decode("latin-1")
            backend.queues.admit(context.scope["method"], context.scope["path"], content_type)

    def hold(self, context: _RequestContext, size: int) -> None:
        """Count bytes of a body before they are read. Raises `TooLarge` and `QueueFull`."""
        if context.held + size > self.config.max_body:
            raise TooLarge(f"the body of a request may have {self.config.max_body} bytes")
        if self._bodies + size > self.config.max_bodies:
            raise QueueFull("too much is being sent by all clients together: try again later")
        context.held += size
        self._bodies += size

    def _record(self, context: _RequestContext) -> None:
        seconds = time.perf_counter() - context.started
        # the path as declared: actual paths hold ids
        route = getattr(context.scope.get("route"), "path", "none")
        status = context.status or (500 if context.failed else ClientGone.status)
        self._metrics.requests.labels(_method(context.method), route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        if status == ClientGone.status or not (context.finished or context.failed):
            self._metrics.left.labels(route).inc()
        log.info("%s %s %s %.1f ms", context.method, route, status, 1000 * seconds)


class _RequestContext:
    """One request: how much of its body is held in memory, and how far its answer is."""

    def __init__(self, admission: AdmissionMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self.started = scope, time.perf_counter()
        self.method: str = scope["method"]
        self.status, self.arrived, self.finished, self.failed = 0, False, False, False
        self.held, self.read = 0, 0  # bytes of the body
        self._admission, self._receive, self._send = admission, receive, send

    def header(self, name: bytes) -> bytes:
        headers: Iterable[tuple[bytes, bytes]] = self.scope["headers"]
        return next((value for key, value in headers if key == name), b"")

    def hold(self, size: int) -> None:
        self._admission.hold(self, size)

    async def receive(self) -> Message:
        if self.arrived:
            return await self._receive()  # waits until the client leaves
        seconds = self._admission.config.body_deadline
        try:
            async with asyncio.timeout(self.started + seconds - time.perf_counter()):
                message = await self._receive()
        except TimeoutError as error:
            raise BodyTimeout(f"the body did not arrive within {seconds:g} s") from error
        if message["type"] == "http.request":
            self.arrived = not message.get("more_body", False)
            self.read += len(message.get("body", b""))
            if self.read > self.held:  # a body of unknown length
                self.hold(self.read - self.held)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif self.method == "HEAD" and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.finished = True


def _host(value: bytes) -> str:
    """The host of a `Host` header, without its port."""
    text = value.decode("latin-1")
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def _method(method: str) -> str:
    """The method's name for metrics; clients may send any, so unknown ones share the name "other"."""
    return method if method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH") else "other"
