"""What the service allows: one place for every limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.config import load_config


@dataclass(frozen=True)
class ServiceConfig:
    """Limits of one service. Sizes are bytes, times seconds; `waiting_*` counts what was accepted and is not done."""

    keys: tuple[str, ...] = ()  # bearer keys; none: only clients on this machine, see `keys.check_binding`
    allow_urls: bool = False
    log_prompts: bool = False

    # of one request, checked before anything is decoded
    max_body: int = 32 * 2**20
    max_inputs: int = 256  # texts, pictures or items
    max_text: int = 8192  # characters
    max_pixels: int = 2**24
    max_pictures: int = 10  # drawn
    max_described: int = 16  # pictures to be captioned, or ranked
    max_hits: int = 1000

    # of all requests together
    max_requests: int = 1024
    max_bodies: int = 256 * 2**20
    body_deadline: float = 60.0  # for a body to arrive
    waiting_texts: int = 1024
    waiting_images: int = 512
    waiting_drawings: int = 64
    waiting_tasks: int = 32  # requests for captions and reranking
    waiting_searches: int = 256

    # how requests share a pass of the model
    batch_texts: int = 64
    batch_images: int = 32
    window: float = 0.002  # how long a batch that is not full waits for more
    drawing_window: float = 0.05
    tower_workers: int = 2  # passes of a tower at a time, which share the CPU's threads; on a GPU one

    deadline: float = 60.0  # for an answer, after acceptance
    drawing_deadline: float = 600.0

    max_fetch: int = 16 * 2**20
    fetch_deadline: float = 10.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) in (int, float) and not (0 < value < math.inf or (value == 0 and "window" in name)):
                raise ValueError(f"{name} must be above 0, not {value}")
        for most, waiting in (
            (self.max_inputs, "waiting_texts"),
            (self.max_inputs, "waiting_images"),
            (self.max_pictures, "waiting_drawings"),
        ):
            if most > getattr(self, waiting):
                raise ValueError(f"{waiting} must be at least {most}: one request may ask for so many")


def with_limits(limits: Sequence[str], **options: Any) -> ServiceConfig:
    """A configuration of `options` and of NAME=NUMBER for other fields. Raises `ValueError`."""
    for name in (limit.partition("=")[0].strip() for limit in limits):
        if name in options:
            raise ValueError(f"--limit {name}: that has an option of its own")
    return replace(load_config(ServiceConfig, overrides=limits), **options)
