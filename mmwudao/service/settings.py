"""Every option of the service, written once: `mmwudao serve`, Ray Serve and the tests read these fields.

Imports nothing heavy: the command line makes its options from `ServeSettings`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.config import ConfigError, load_config
from data.options import check_options, option
from mmwudao.loading.options import RunOptions, VectorMaker

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s@]+|null")  # RFC 6454, section 6.2


@dataclass(frozen=True, kw_only=True)
class SourceOptions(RunOptions):
    """What is loaded, from where, and onto which device."""

    model: str = option(
        "emoji", "The model is a shipped name, a model directory, a hub id, or a folder of towers alone."
    )
    towers: str | None = option(None, "Use these towers for vectors and search instead of the model's own.")
    by: VectorMaker = option(
        "towers", "Take the vectors of the model's towers, or of its generator, if that learned to match."
    )
    collection: str | None = option(
        None, "Search this collection, a folder, a bucket or a server; it is made if it is missing."
    )
    durable: bool = option(False, "Make writes to the collection survive a loss of power too, which is slower.")


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """Options of the running service that have an option of their own on the command line. Times are seconds."""

    allow_urls: bool = option(False, "Fetch pictures that clients name by public URLs.")
    log_prompts: bool = option(False, "Write the texts that clients send to the log.")
    cors: list[str] = option(
        [], "Let web pages of this origin ask, such as https://example.org, or * for all; may be repeated."
    )
    max_requests: int = option(1024, "Answer at most this many requests at a time; others get status 429.", least=1)
    deadline: float = option(60.0, "Answer a request within this many seconds after its acceptance.", above=0)
    drawing_deadline: float = option(
        600.0, "Answer a request for pictures, captions or reranking within this many seconds.", above=0
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """How many replicas Ray Serve runs, and what it reserves for each."""

    tower_replicas: int = option(1, "With --ray, run this many processes that compute vectors.", least=1)
    generator_replicas: int = option(
        1, "With --ray, run this many processes that draw; 0 serves vectors alone.", least=0
    )
    cpus: float = option(1.0, "With --ray, reserve this many cores for each replica.", least=0)
    gpus: float = option(0.0, "With --ray, reserve this many GPUs, or a part of one, for each replica.", least=0)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class ServiceConfig(RequestOptions):
    """Limits of one service. Sizes are bytes, times seconds; `waiting_*` counts items accepted and not yet done."""

    keys: tuple[str, ...] = ()  # bearer keys; without any, only clients on this machine (`keys.check_binding`)

    # of one request, checked before anything is decoded
    max_body: int = option(32 * 2**20, "The body of a request has at most this many bytes.", least=1)
    max_inputs: int = option(256, "A request has at most this many texts, pictures or items.", least=1)
    max_text: int = option(8192, "A text has at most this many characters.", least=1)
    max_pixels: int = option(2**24, "A picture has at most this many pixels.", least=1)
    max_pictures: int = option(10, "A request draws at most this many pictures.", least=1)
    max_described: int = option(16, "A request has at most this many pictures to caption or to rank.", least=1)
    max_hits: int = option(1000, "A search returns at most this many items.", least=1)

    # of all requests together
    max_bodies: int = option(256 * 2**20, "All bodies together have at most this many bytes.", least=1)
    body_deadline: float = option(60.0, "A body arrives within this many seconds.", above=0)
    waiting_texts: int = option(1024, "At most this many texts wait for their vectors.", least=1)
    waiting_images: int = option(512, "At most this many pictures wait for their vectors.", least=1)
    waiting_drawings: int = option(64, "At most this many pictures wait to be drawn.", least=1)
    waiting_tasks: int = option(32, "At most this many requests wait for captions or reranking.", least=1)
    waiting_searches: int = option(256, "At most this many searches wait, and as many writes.", least=1)

    # how requests share a pass of the model
    batch_texts: int = option(64, "A pass of the text tower reads at most this many texts.", least=1)
    batch_images: int = option(32, "A pass of the image tower reads at most this many pictures.", least=1)
    window: float = option(0.002, "A batch that is not full waits this many seconds for more inputs.", least=0)
    drawing_window: float = option(0.05, "Drawings wait this many seconds for others to share their batch.", least=0)
    tower_workers: int = option(2, "This many passes of a tower share the CPU's threads; a GPU runs one.", least=1)

    max_fetch: int = option(16 * 2**20, "A picture behind a URL has at most this many bytes.", least=1)
    fetch_deadline: float = option(10.0, "A picture behind a URL arrives within this many seconds.", above=0)

    def __post_init__(self) -> None:
        check_options(self)
        check_origins(self.cors, self.keys)
        for most, waiting in (
            (self.max_inputs, "waiting_texts"),
            (self.max_inputs, "waiting_images"),
            (self.max_pictures, "waiting_drawings"),
        ):
            if most > getattr(self, waiting):
                raise ValueError(f"{waiting} must be at least {most}: one request may ask for so many")


def check_origins(origins: Sequence[str], keys: Sequence[str]) -> None:
    """Raises `ValueError` for what no browser would call an origin, and for all origins where there are no keys."""
    for origin in origins:
        if origin == "*" and not keys:
            raise ValueError("--cors '*' without keys lets every page of the web use this server: name the origins")
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise ValueError(f"--cors takes an origin such as https://example.org, without a path, not {origin[:80]!r}")


@dataclass(frozen=True, kw_only=True)
class ServeSettings(ReplicaOptions, RequestOptions, SourceOptions):
    """What is served, and how: the options of `mmwudao serve`, and the arguments of `ray.deployments.build`."""

    keys_file: str | None = option(None, "Read bearer keys, one a line, from this file, and others from MMWUDAO_KEYS.")
    limit: list[str] = option([], "Set any other limit by NAME=NUMBER, such as waiting_texts=4096; may be repeated.")

    def __post_init__(self) -> None:
        check_options(self)

    def check_mode(self, by_ray: bool) -> None:
        """Raises `ValueError` for an option that only one process has, or only the replicas of Ray Serve."""
        if by_ray and self.device != "auto":
            raise ValueError("with --ray, replicas work on GPUs that --gpus reserves, else on CPUs: leave out --device")
        replicas = (getattr(self, one.name) == one.default for one in dataclasses.fields(ReplicaOptions))
        if not by_ray and not all(replicas):
            raise ValueError("replicas are for --ray: without it, one process has one of each")

    def config(self, keys: Sequence[str]) -> ServiceConfig:
        """The limits of the running service. Raises `ValueError` for an entry of `limit` that names no other limit."""
        own = {one.name: getattr(self, one.name) for one in dataclasses.fields(RequestOptions)}
        for name in (limit.partition("=")[0].strip() for limit in self.limit):
            if name in own or name == "keys":
                raise ValueError(f"--limit {name}: that has an option of its own")
        return dataclasses.replace(load_config(ServiceConfig, overrides=self.limit), keys=tuple(keys), **own)


def parse_settings(arguments: Mapping[str, Any]) -> ServeSettings:
    """Settings of a YAML file or of NAME=VALUE arguments, whose values may be strings ("2", "true").

    Raises `ConfigError` (a `ValueError`) for an unknown name or a value that does not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    known = [one.name for one in dataclasses.fields(ServeSettings)]
    for name in arguments:
        if name not in known:
            raise ConfigError(f"unknown option {name}; known here: {', '.join(known)}")
    try:
        return TypeAdapter(ServeSettings).validate_python(dict(arguments))
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # from `__post_init__`, which names the option
            raise ConfigError(str(first["ctx"]["error"])) from error
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
