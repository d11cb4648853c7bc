"""The service as Ray Serve deployments: replicas of towers and of the generator, on one machine or many.

    mmwudao serve --ray local --tower-replicas 2 --generator-replicas 1
    serve run mmwudao.service.ray.deployments:build model=emoji tower_replicas=2 keyless=true

A replica of "towers" holds the application of one server (`mmwudao.service.app`) with its own towers, collection and
queues, so that vectors and search never leave the process that read the request. It sends drawings, captions,
enlarging and reranking on to the replicas of "generator" (`mmwudao.service.ray.remote`). Needs
pip install 'mmwudao[ray]'.
"""

from __future__ import annotations

import math
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from mmwudao.service.app import create_app
from mmwudao.service.keys import KEYS_VARIABLE, check_binding, read_keys
from mmwudao.service.opening import find_sources, load_generator, open_served
from mmwudao.service.ray.cluster_metrics import ClusterMetrics, close_board
from mmwudao.service.ray.remote import GeneratorWorker, RemoteGenerator
from mmwudao.service.server import KEEP_ALIVE, configure_logging
from mmwudao.service.settings import ServeSettings, ServiceConfig, parse_settings

NAME = "mmwudao"
CONSTRUCTION_TRIES = 3  # of a replica, before the deployment is given up
SPARE = 64  # calls of a generator beyond those that its queues admit
UNBOUNDED = 2**20


class TowersReplica:
    """A replica of the towers, with the application in front of them."""

    async def __init__(  # type: ignore[misc]  # Serve waits for it
        self, settings: ServeSettings, config: ServiceConfig, generator: DeploymentHandle[Any] | None, created: int
    ) -> None:
        configure_logging(config.log_prompts)
        self._created = created
        self._config, self._metrics, remote = config, ClusterMetrics(), None
        if generator is not None:
            remote = RemoteGenerator(generator, await generator.describe.remote(), settings.generator_replicas)
        self._served = open_served(settings, remote)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._served, self._config, self._metrics, self._created)

    def __del__(self) -> None:
        if hasattr(self, "_served"):
            self._served.close()


class GeneratorReplica(GeneratorWorker):
    """A replica of the generator."""

    async def __init__(self, settings: ServeSettings, config: ServiceConfig) -> None:  # type: ignore[misc]
        configure_logging(config.log_prompts)
        super().__init__(Path(settings.model).name, load_generator(settings), config, ClusterMetrics())


def build(arguments: dict[str, Any]) -> Application:
    """For `serve run` and Serve's configuration files: the fields of `ServeSettings`, and `keyless`.

    `keyless=true` serves without keys: Serve must then listen on 127.0.0.1, its default. Raises `ValueError` as
    `application` does, and for an unknown argument.
    """
    fields = dict(arguments)
    keyless = str(fields.pop("keyless", False)).lower()
    if keyless not in ("true", "false"):
        raise ValueError(f"keyless must be true or false, not {keyless}")
    settings = parse_settings(fields)
    keys = read_keys(settings.keys_file)
    if not keys and keyless == "false":
        raise ValueError(f"give keys (keys_file, or {KEYS_VARIABLE}), or keyless=true if Serve listens on 127.0.0.1")
    return application(settings, keys)


def application(settings: ServeSettings, keys: Sequence[str]) -> Application:
    """The deployments, not yet running.

    Raises `ValueError` for a model that is not there and for options that do not go together.
    """
    settings.check_mode(by_ray=True)
    names = ("model", "towers", "collection", "adapter")
    places: dict[str, Any] = {name: _absolute(getattr(settings, name)) for name in names}
    settings = replace(settings, **places, device="cuda" if settings.gpus else "cpu")
    sources = find_sources(settings)
    config = settings.config(keys)
    front, behind = share_limits(config, settings)
    common: dict[str, Any] = {
        "max_constructor_retry_count": CONSTRUCTION_TRIES,
        "ray_actor_options": {"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        "graceful_shutdown_timeout_s": max(config.deadline, config.drawing_deadline) + 5,  # past every deadline
        "logging_config": LoggingConfig(enable_access_log=False),  # our middleware logs without ids and queries
    }
    generator = None
    if sources.generator is not None:
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
        # all requests reach the application, which refuses those beyond `max_requests`: Ray's own 429 is plain text
        max_ongoing_requests=UNBOUNDED,
        **common,
    )
    return ingress(serve.ingress()(TowersReplica)).bind(settings, front, generator, int(time.time()))


def share_limits(config: ServiceConfig, settings: ServeSettings) -> tuple[ServiceConfig, ServiceConfig]:
    """The limits of a replica of the towers, and of one of the generator.

    All towers together admit what as many single servers as there are generators would, and each generator has room
    for all of it.
    """
    towers = settings.tower_replicas
    share = settings.generator_replicas / towers
    drawings = max(config.max_pictures, math.ceil(config.waiting_drawings * share))
    tasks = max(1, math.ceil(config.waiting_tasks * share))
    front = replace(config, waiting_drawings=drawings, waiting_tasks=tasks)
    return front, replace(config, waiting_drawings=drawings * towers, waiting_tasks=tasks * towers)


def serve_replicas(settings: ServeSettings, host: str, port: int) -> None:
    """Serve on the Ray cluster that this process is connected to until SIGTERM or SIGINT, then shut Ray Serve down.

    Every machine of the cluster that has a replica listens on `host`. Raises `ValueError` as `application` does,
    and for an address that others can reach without a key.
    """
    keys = read_keys(settings.keys_file)
    check_binding(host, keys)
    built = application(settings, keys)
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
        serve.delete(NAME)  # finishes what was accepted
        serve.shutdown()
        close_board()
        signal.signal(signal.SIGTERM, before)


def _reason() -> str:
    """The last line of the exception that a replica raised, out of Ray Serve's longer message."""
    found = serve.status().applications[NAME].deployments.values()
    lines = [line for one in found for line in one.message.splitlines() if re.match(r"[\w.]*(Error|Exception): ", line)]
    return lines[-1] if lines else ""


def _stop(*_: object) -> None:
    raise SystemExit(0)


def _absolute(place: str | None) -> str | None:
    """The absolute path of a folder: replicas have other working directories."""
    if place is None or "://" in place or not Path(place).expanduser().exists():
        return place
    return str(Path(place).expanduser().absolute())
