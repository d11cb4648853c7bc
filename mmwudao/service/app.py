"""The ASGI application: routes and error handlers, with the admission middleware in front of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route
from starlette.types import Scope

from mmwudao.service import routes_chat, routes_edits, routes_embeddings, routes_items, routes_pictures, schemas
from mmwudao.service.answering import ERRORS, Backend, TheBackend
from mmwudao.service.errors import Unavailable, as_http_error, error_response, is_users_mistake
from mmwudao.service.inputs import InputDecoder
from mmwudao.service.metrics import Metrics
from mmwudao.service.middleware import AdmissionMiddleware
from mmwudao.service.queues import Served, ServiceQueues
from mmwudao.service.settings import ServiceConfig
from mmwudao.version import __version__

router = APIRouter()
PARTS = tuple(part.router for part in (routes_embeddings, routes_pictures, routes_edits, routes_chat, routes_items))


class DirectRoute(Route):
    """A route of Starlette's own, for what clients call most and takes nothing but the request.

    FastAPI's looks for dependencies, which takes longer than reading, checking and answering a request of one text.
    """

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        return match, {**found, "route": self}  # by which requests are counted, as FastAPI's


def create_app(
    served: Served,
    config: ServiceConfig | None = None,
    metrics: Metrics | None = None,
    created: int | None = None,
) -> FastAPI:
    """The application of one server, for any ASGI server.

    `created` is what model cards tell, in seconds since 1970; by default now. The replicas of a cluster tell the same.
    """
    config = config or ServiceConfig()
    metrics = metrics or Metrics()
    created = int(time.time()) if created is None else created

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        backend = Backend(ServiceQueues(served, config, metrics), InputDecoder(config), created)
        app.state.backend = backend
        backend.queues.start()
        app.state.ready = True
        yield
        app.state.ready = False
        await backend.queues.stop()
        await asyncio.to_thread(backend.decoder.close)

    # the page at /docs loads its script and style from this server
    app = FastAPIOffline(
        title="mmwudao",
        version=__version__,
        description="Vectors of texts and pictures, search, pictures of sentences, captions, and answers.",
        lifespan=lifespan,
        redoc_url=None,
        # a path with a slash too many is a 404
        redirect_slashes=False,
    )
    app.state.ready, app.state.metrics = False, metrics
    # only for the description: the middleware has checked the key before a route is reached
    documented = [Depends(HTTPBearer(auto_error=False))] if config.keys else []
    # in front of its description among FastAPI's routes
    app.router.routes.insert(0, DirectRoute("/v1/embeddings", routes_embeddings.embeddings, methods=["POST"]))
    for routes in (*PARTS, router):
        app.include_router(routes, dependencies=documented)
    app.add_middleware(AdmissionMiddleware, config=config, metrics=metrics)
    if config.cors:
        _let_pages_ask(app, config.cors)
    for kind in (HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(ValueError, _on_value_error)
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            routes_embeddings.add_parts(describe())
        return describe()

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
    return app


def _let_pages_ask(app: FastAPI, origins: Sequence[str]) -> None:
    """Answer browsers that ask for web pages of these origins; outside the admission, so that they see refusals too."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
        allow_headers=["*"],
        allow_private_network=True,
        expose_headers=["Retry-After"],
    )


async def _on_error(_: Request, error: Exception) -> Response:
    return error_response(as_http_error(error))


async def _on_value_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ValueError)
    if not is_users_mistake(error):
        raise error  # a bug: the framework logs its traceback and answers by the handler of `Exception`
    return await _on_error(request, error)


@router.get("/v1/models", response_model=schemas.ModelList, responses=ERRORS, tags=["server"])
async def models(backend: TheBackend) -> schemas.ModelList:
    """The one model that is served, and what it can do."""
    return schemas.ModelList(data=[_card(backend)])


@router.get("/v1/models/{name:path}", response_model=schemas.ModelCard, responses=ERRORS, tags=["server"])
async def model(name: str, backend: TheBackend) -> schemas.ModelCard:
    """The model of that name."""
    backend.queues.check_model(name)
    return _card(backend)


def _card(backend: Backend) -> schemas.ModelCard:
    return schemas.ModelCard(id=backend.served.name, created=backend.created, can=backend.served.abilities)


@router.get("/healthz", tags=["server"])
async def healthz() -> dict[str, str]:
    """Whether the process answers."""
    return {"status": "alive"}


@router.get("/readyz", responses={503: {"model": schemas.Error}}, tags=["server"])
async def readyz(request: Request) -> dict[str, str]:
    """Whether requests are accepted."""
    if not request.app.state.ready:
        raise Unavailable("not ready")
    return {"status": "ready"}


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **ERRORS}, tags=["server"])
async def metrics(request: Request) -> Response:
    """Metrics in the text format of Prometheus."""
    text: bytes = await request.app.state.metrics.exposition()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
