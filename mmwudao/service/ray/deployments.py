"""The service as Ray Serve deployments: replicas of towers and of the generator, on one machine or many.

    mmwudao serve --ray local --tower-replicas 2 --generator-replicas 1
    serve run mmwudao.service.ray.deployments:build model=emoji tower_replicas=2 keyless=true

A replica of "towers" holds the application of one server (`mmwudao.service.app`) with its own towers, collection and
queues, so that vectors and search never leave the process that read the request. Drawings, captions, enlarging and
reranking by the generator are sent on to the replicas of "generator" (`mmwudao.service.ray.remote`). Needs
pip install 'mmwudao[ray]'.
"""

from __future__ import annotations

import math
import re
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from generation.drawing.engines import Kind
from mmwudao.loading.model_dir import find_model, read_model_config
from mmwudao.loading.towers import load_model_towers
from mmwudao.pipeline import load
from mmwudao.service.app import create_app
from mmwudao.service.keys import KEYS_VARIABLE, check_binding, is_loopback, read_keys
from mmwudao.service.queues import Served
from mmwudao.service.ray.remote import FrontEngine, GeneratorWorker, RemotePipeline
from mmwudao.service.server import KEEP_ALIVE, configure_logging
from mmwudao.service.settings import ServiceConfig, with_limits
from retrieval.collections.opening import open_collection
from vqvae.storage.parts import content_hash

NAME = "mmwudao"
CONSTRUCTION_TRIES = 3  # of a replica, before the deployment is given up
SPARE = 64  # requests beyond `max_requests` that reach the application, which refuses them or tells its health


class ScaleOut(BaseModel):
    """What is served and by how many. The options are those of `mmwudao serve`.

    `cpus` and `gpus` are reserved for each replica; with a GPU, or a part of one, it works there.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "emoji"
    towers: str | None = None
    collection: str | None = None
    adapter: str | None = None
    durable: bool = False
    tower_replicas: int = Field(default=1, ge=1)
    generator_replicas: int = Field(default=1, ge=0)  # 0: vectors and search alone
    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    dtype: str = "auto"
    engine: Kind = "auto"
    keys_file: Path | None = None
    keyless: bool = False  # without keys; Serve must listen on 127.0.0.1, as it does unless told otherwise
    allow_urls: bool = False
    log_prompts: bool = False
    max_requests: int = Field(default=1024, ge=1)
    deadline: float = 60.0
    drawing_deadline: float = 600.0
    limit: list[str] = []  # NAME=NUMBER for other fields of `ServiceConfig`


class TowersReplica:
    """A replica of the towers, with the application in front of them."""

    async def __init__(  # type: ignore[misc]  # Serve waits for it
        self, settings: ScaleOut, config: ServiceConfig, generator: DeploymentHandle[Any] | None
    ) -> None:
        configure_logging(config.log_prompts)
        self._config, self._generators = config, settings.generator_replicas
        source = _towers_source(settings)
        towers = load_model_towers(source, _device(settings)) if source is not None else None
        pipeline = RemotePipeline(generator, await generator.describe.remote()) if generator is not None else None
        collection = None
        if settings.collection is not None:
            assert towers is not None
            collection = open_collection(
                settings.collection,
                create=True,
                dim=towers.embed_dim,
                model=content_hash(towers),
                durable=settings.durable,
            )
        self._served = Served(Path(settings.model).name, towers, pipeline, collection)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._served, self._config, partial(FrontEngine, generators=self._generators))

    def __del__(self) -> None:
        served = getattr(self, "_served", None)
        if served is not None and served.collection is not None:
            served.collection.close()


class GeneratorReplica(GeneratorWorker):
    """A replica of the generator."""

    async def __init__(self, settings: ScaleOut, config: ServiceConfig) -> None:  # type: ignore[misc]
        configure_logging(config.log_prompts)
        adapter = Path(settings.adapter) if settings.adapter else None
        pipeline = load(settings.model, _device(settings), settings.dtype, adapter, settings.engine)
        super().__init__(Path(settings.model).name, pipeline, config)


def build(arguments: dict[str, Any]) -> Application:
    """For `serve run` and Serve's configuration files; `arguments` are the fields of `ScaleOut`.

    Raises `ValueError` as `application` does.
    """
    return application(ScaleOut.model_validate(arguments))


def application(settings: ScaleOut) -> Application:
    """The deployments, not yet running.

    Raises `ValueError` for a model that is not there, for options that do not go together, and without keys unless
    `keyless` says that only this machine can ask.
    """
    settings = settings.model_copy(
        update={name: _absolute(getattr(settings, name)) for name in ("model", "towers", "collection", "adapter")}
    )
    keys = read_keys(settings.keys_file)
    if not keys and not settings.keyless:
        raise ValueError(f"give keys (keys_file, or {KEYS_VARIABLE}), or keyless=true if Serve listens on 127.0.0.1")
    draws = settings.generator_replicas > 0 and not _towers_alone(settings.model)
    if settings.adapter and not draws:
        raise ValueError("a style is for a generator: without one there is no --adapter")
    if settings.towers and _towers_alone(settings.model):
        raise ValueError(f"{settings.model} holds towers alone: it takes no --towers")
    if _towers_source(settings) is None and (settings.collection or not draws):
        raise ValueError(f"{settings.model} has no towers: give --towers")
    config = with_limits(
        settings.limit,
        keys=keys,
        allow_urls=settings.allow_urls,
        log_prompts=settings.log_prompts,
        max_requests=settings.max_requests,
        deadline=settings.deadline,
        drawing_deadline=settings.drawing_deadline,
    )
    front, behind = queues(config, settings)
    common: dict[str, Any] = {
        "max_constructor_retry_count": CONSTRUCTION_TRIES,
        "ray_actor_options": {"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        "graceful_shutdown_timeout_s": max(config.deadline, config.drawing_deadline) + 5,  # past every deadline
        "logging_config": LoggingConfig(enable_access_log=False),  # the gate writes its own, without ids and queries
    }
    generator = None
    if draws:
        deployment = serve.deployment(
            name="generator",
            num_replicas=settings.generator_replicas,
            max_ongoing_requests=behind.waiting_drawings + behind.waiting_tasks + SPARE,
            **common,
        )
        generator = deployment(GeneratorReplica).bind(settings, behind)
    ingress = serve.deployment(
        name="towers",
        num_replicas=settings.tower_replicas,
        max_ongoing_requests=config.max_requests + SPARE,
        max_queued_requests=SPARE,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        **common,
    )
    return ingress(serve.ingress()(TowersReplica)).bind(settings, front, generator)


def queues(config: ServiceConfig, settings: ScaleOut) -> tuple[ServiceConfig, ServiceConfig]:
    """The limits of a replica of the towers, and of the generator.

    The towers let through, all together, what so many servers would. All of it has room in any of the generators.
    """
    towers = settings.tower_replicas
    share = settings.generator_replicas / towers
    drawings = max(config.max_pictures, math.ceil(config.waiting_drawings * share))
    tasks = max(1, math.ceil(config.waiting_tasks * share))
    front = replace(config, waiting_drawings=drawings, waiting_tasks=tasks)
    return front, replace(config, waiting_drawings=drawings * towers, waiting_tasks=tasks * towers)


def run(settings: ScaleOut, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT on the Ray cluster that this process is connected to, then take all of it down.

    Every machine of the cluster that has a replica listens on its `host`. Raises `ValueError` as `application` does,
    and for an address that others can reach without a key.
    """
    check_binding(host, read_keys(settings.keys_file))
    built = application(settings.model_copy(update={"keyless": is_loopback(host)}))
    if serve.status().proxies:
        raise ValueError("Ray Serve runs on this cluster already: `serve run`, or end it with `serve shutdown`")
    replicas = settings.tower_replicas + settings.generator_replicas
    for kind, each in (("CPU", settings.cpus), ("GPU", settings.gpus)):
        there = ray.cluster_resources().get(kind, 0)
        if replicas * each > there:
            raise ValueError(
                f"{replicas} replicas of {each:g} {kind} each, and the cluster has {there:g}: "
                f"give fewer replicas, or a smaller --{kind.lower()}s (a part of one will do)"
            )
    before = signal.signal(signal.SIGTERM, _stop)
    serve.start(http_options={"host": host, "port": port, "keep_alive_timeout_s": KEEP_ALIVE})
    try:
        try:
            serve.run(built, name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise ValueError(f"the replicas do not start: {_reason() or error}") from error
        counts = f"{settings.tower_replicas} x towers, {settings.generator_replicas} x generator"
        print(f"serving {Path(settings.model).name} on {host}:{port} ({counts})", file=sys.stderr)
        while True:
            time.sleep(1)
    finally:
        serve.delete(NAME)  # what was accepted is finished
        serve.shutdown()
        signal.signal(signal.SIGTERM, before)


def _reason() -> str:
    """The last line of what a replica raised, which Ray Serve has in a longer message."""
    found = serve.status().applications[NAME].deployments.values()
    lines = [line for one in found for line in one.message.splitlines() if re.match(r"[\w.]*(Error|Exception): ", line)]
    return lines[-1] if lines else ""


def _stop(*_: object) -> None:
    raise SystemExit(0)


def _device(settings: ScaleOut) -> str:
    return "cuda" if settings.gpus else "cpu"


def _absolute(place: str | None) -> str | None:
    """A folder by its whole path: replicas have other working directories."""
    if place is None or "://" in place or not Path(place).expanduser().exists():
        return place
    return str(Path(place).expanduser().absolute())


def _towers_alone(model: str) -> bool:
    return (Path(model) / "model.safetensors").exists()


def _towers_source(settings: ScaleOut) -> str | None:
    """Where towers are loaded from, if there are any. Raises `ModelError`."""
    if settings.towers is not None:
        return settings.towers
    if _towers_alone(settings.model) or "towers" in read_model_config(find_model(settings.model)).parts:
        return settings.model
    return None
