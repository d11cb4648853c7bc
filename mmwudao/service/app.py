"""The application: routes, errors, the gate in front, and the engine behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from mmwudao.service import routes_embeddings, routes_items, routes_pictures, schemas
from mmwudao.service.answering import ERRORS, engine_of
from mmwudao.service.errors import ServiceError, error_response, invalid
from mmwudao.service.incoming import Incoming
from mmwudao.service.metrics import Metrics
from mmwudao.service.middleware import Gate
from mmwudao.service.queues import Engine, Served
from mmwudao.service.settings import ServiceConfig
from mmwudao.version import __version__

router = APIRouter()


class NotReady(ServiceError):
    """Starting, or stopping."""

    status = 503
    kind = "server_error"


def create_app(
    served: Served,
    config: ServiceConfig | None = None,
    make_engine: Callable[[Served, ServiceConfig, Metrics], Engine] = Engine,
) -> FastAPI:
    """The ASGI application of one server, which may be run by any ASGI server."""
    config = config or ServiceConfig()
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = make_engine(served, config, metrics)
        app.state.engine, app.state.incoming = engine, Incoming(config)
        engine.start()
        app.state.ready = True
        yield
        app.state.ready = False
        await engine.stop()
        await asyncio.to_thread(app.state.incoming.close)

    # the page at /docs brings its script and style along
    app = FastAPIOffline(
        title="mmwudao",
        version=__version__,
        description="Vectors of texts and pictures, search, pictures of sentences, and captions.",
        lifespan=lifespan,
        redoc_url=None,
        # an answer never depends on a slash too many
        redirect_slashes=False,
    )
    app.state.ready, app.state.metrics = False, metrics
    # the gate has looked at the key when a route is reached; this is for the description
    documented = [Depends(HTTPBearer(auto_error=False))] if config.keys else []
    for routes in (routes_embeddings.router, routes_pictures.router, routes_items.router, router):
        app.include_router(routes, dependencies=documented)
    app.add_middleware(Gate, config=config, metrics=metrics)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(Exception, _on_failure)
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            routes_embeddings.add_parts(describe())
        return describe()

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
    return app


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(error)


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(invalid(error))


async def _on_failure(_: Request, error: Exception) -> Response:
    """A mistake of ours: the server's log has the traceback, the client does not."""
    return error_response(HTTPException(500, "the server failed"))


@router.get("/v1/models", response_model=schemas.ModelList, responses=ERRORS, tags=["server"])
async def models(engine: Annotated[Engine, Depends(engine_of)]) -> schemas.ModelList:
    """The one model that is served, and what it can do."""
    card = schemas.ModelCard(id=engine.served.name, can=engine.served.abilities)
    return schemas.ModelList(data=[card])


@router.get("/healthz", tags=["server"])
async def healthz() -> dict[str, str]:
    """Whether the process answers."""
    return {"status": "alive"}


@router.get("/readyz", responses={503: {"model": schemas.Error}}, tags=["server"])
async def readyz(request: Request) -> dict[str, str]:
    """Whether requests are accepted."""
    if not request.app.state.ready:
        raise NotReady("not ready")
    return {"status": "ready"}


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **ERRORS}, tags=["server"])
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    text: bytes = request.app.state.metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
