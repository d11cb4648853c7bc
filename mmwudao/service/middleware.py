"""What every request passes before any of it is parsed: the key, the caps on bodies, and the books afterwards."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmwudao.service.errors import (
    BadInput,
    Busy,
    ClientGone,
    Forbidden,
    ServiceError,
    Slow,
    TooLarge,
    Unauthorized,
    error_response,
)
from mmwudao.service.keys import KeyRing, is_loopback
from mmwudao.service.metrics import Metrics
from mmwudao.service.settings import ServiceConfig

# what may be asked without a key: nothing in it is anybody's
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json"})
OPEN_FOLDER = "/static-offline-docs/"  # the script and style of /docs

log = logging.getLogger("mmwudao.service.access")


class Gate:
    """ASGI middleware. It sees a request before FastAPI reads its body, which FastAPI does before any dependency."""

    def __init__(self, app: ASGIApp, config: ServiceConfig, metrics: Metrics) -> None:
        self._app, self.config, self._metrics = app, config, metrics
        self._keys = KeyRing(config.keys)
        self._requests = 0
        self._bodies = 0  # bytes of all requests being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(self, scope, receive, send)
        self._requests += 1
        self._metrics.in_flight.inc()
        try:
            try:
                self._admit(visit)
                await self._app(scope, visit.receive, visit.send)
            except ServiceError as error:
                if visit.status:
                    raise
                await error_response(error)(scope, receive, visit.send)
        except Exception:
            visit.failed = True  # the framework's answer is sent outside of this
            raise
        finally:
            self._requests -= 1
            self._bodies -= visit.held
            self._metrics.in_flight.dec()
            self._write_down(visit)

    def _admit(self, visit: _Visit) -> None:
        if visit.scope["path"] in OPEN_PATHS or visit.scope["path"].startswith(OPEN_FOLDER):
            return
        if self._keys:
            if not self._keys.accepts(visit.header(b"authorization")):
                raise Unauthorized("a known key is needed: send it as 'Authorization: Bearer KEY'")
        elif not is_loopback(_host(visit.header(b"host"))):
            # a web page may point a name of its own at this machine (DNS rebinding)
            raise Forbidden("without keys this service answers only to localhost")
        if self._requests > self.config.max_requests and visit.scope["path"] != "/metrics":
            raise Busy(f"{self.config.max_requests} requests are being answered: try again later")
        length = visit.header(b"content-length")
        if length:
            if not length.isdigit():
                raise BadInput("Content-Length must be a number")
            visit.hold(int(length[:20]))

    def hold(self, visit: _Visit, size: int) -> None:
        """Count bytes of a body before they are read. Raises `TooLarge`, `Busy`."""
        if visit.held + size > self.config.max_body:
            raise TooLarge(f"the body of a request may have {self.config.max_body} bytes")
        if self._bodies + size > self.config.max_bodies:
            raise Busy("too much is being sent by all clients together: try again later")
        visit.held += size
        self._bodies += size

    def _write_down(self, visit: _Visit) -> None:
        seconds = time.perf_counter() - visit.started
        # the path as declared: paths themselves hold ids
        route = getattr(visit.scope.get("route"), "path", "none")
        status = visit.status or (500 if visit.failed else ClientGone.status)
        self._metrics.requests.labels(_method(visit.scope["method"]), route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        if status == ClientGone.status or not (visit.finished or visit.failed):
            self._metrics.left.labels(route).inc()
        log.info("%s %s %s %.1f ms", visit.scope["method"], route, status, 1000 * seconds)


class _Visit:
    """One request on its way: how much of its body is held, what was answered."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self.started = scope, time.perf_counter()
        self.status, self.arrived, self.finished, self.failed = 0, False, False, False
        self.held, self.read = 0, 0  # bytes of the body
        self._gate, self._receive, self._send = gate, receive, send

    def header(self, name: bytes) -> bytes:
        headers: Iterable[tuple[bytes, bytes]] = self.scope["headers"]
        return next((value for key, value in headers if key == name), b"")

    def hold(self, size: int) -> None:
        self._gate.hold(self, size)

    async def receive(self) -> Message:
        if self.arrived:
            return await self._receive()  # waits until the client leaves
        seconds = self._gate.config.body_deadline
        try:
            async with asyncio.timeout(self.started + seconds - time.perf_counter()):
                message = await self._receive()
        except TimeoutError as error:
            raise Slow(f"the body did not arrive within {seconds:g} s") from error
        if message["type"] == "http.request":
            self.arrived = not message.get("more_body", False)
            self.read += len(message.get("body", b""))
            if self.read > self.held:  # a body of unknown length
                self.hold(self.read - self.held)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
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
    """A method's name for the books: what clients invent is one kind."""
    return method if method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH") else "other"
