"""The ASGI application: routes and error handlers, with the admission middleware in front of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from mmwudao.service import routes_embeddings, routes_items, routes_pictures, schemas
from mmwudao.service.answering import ERRORS, Backend, TheBackend
from mmwudao.service.errors import Unavailable, as_http_error, error_response, is_users_mistake
from mmwudao.service.inputs import InputDecoder
from mmwudao.service.metrics import Metrics
from mmwudao.service.middleware import AdmissionMiddleware
from mmwudao.service.queues import Served, ServiceQueues
from mmwudao.service.settings import ServiceConfig
from mmwudao.version import __version__

router = APIRouter()


def create_app(served: Served, config: ServiceConfig | None = None) -> FastAPI:
    """The application of one server, for any ASGI server."""
    config = config or ServiceConfig()
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        backend = Backend(ServiceQueues(served, config, metrics), InputDecoder(config))
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
        description="Vectors of texts and pictures, search, pictures of sentences, and captions.",
        lifespan=lifespan,
        redoc_url=None,
        # a path with a slash too many is a 404
        redirect_slashes=False,
    )
    app.state.ready, app.state.metrics = False, metrics
    # only for the description: the middleware has checked the key before a route is reached
    documented = [Depends(HTTPBearer(auto_error=False))] if config.keys else []
    for routes in (routes_embeddings.router, routes_pictures.router, routes_items.router, router):
        app.include_router(routes, dependencies=documented)
    app.add_middleware(AdmissionMiddleware, config=config, metrics=metrics)
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
    card = schemas.ModelCard(id=backend.served.name, can=backend.served.abilities)
    return schemas.ModelList(data=[card])


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
    text: bytes = request.app.state.metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
