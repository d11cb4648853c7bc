"""What the routes need of a model that draws and describes pictures, and the one that works in this process.

`mmwudao.service.ray.remote` has the one whose work is done by the replicas of Ray Serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from PIL import Image

from generation.drawing.blocks import full_block
from mmwudao.loading.model_dir import ModelConfig
from mmwudao.pipeline import Pipeline
from mmwudao.service.batching import Batcher, BatchLimits, Watch, WorkQueue
from mmwudao.service.draw_requests import DrawRequest, draw_block
from mmwudao.service.settings import ServiceConfig
from mmwudao.tasks import Judge

DrawingQueue = WorkQueue[DrawRequest, Image.Image]


class Generator(Protocol):
    """A model that draws, and perhaps describes. Its methods block: call them in threads."""

    @property
    def source(self) -> str:
        """The name that the model was loaded by."""

    @property
    def config(self) -> ModelConfig:
        """What the model can do, and its defaults."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes of a picture."""

    @property
    def concurrent_tasks(self) -> int:
        """How many calls of `caption`, `rerank` and `upscale` may run at a time."""

    def drawing_queue(self, config: ServiceConfig, watch: Watch) -> DrawingQueue:
        """A queue, not yet started, that draws."""

    def caption(self, images: Sequence[Image.Image], language: str, on_step: Callable[[], None]) -> list[str]:
        """A description of each picture; see `tasks.caption_pictures`. An exception of `on_step` ends the search."""

    def rerank(self, prompt: str, images: Sequence[Image.Image], by: Judge) -> list[float]:
        """How well each picture shows the prompt; see `tasks.score_pictures`."""

    def upscale(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """The pictures, enlarged; see `upscaling.upscale_pictures`."""


class LocalGenerator:
    """A `Generator` around a pipeline in this process."""

    concurrent_tasks = 1

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    @property
    def source(self) -> str:
        return self.pipeline.source

    @property
    def config(self) -> ModelConfig:
        return self.pipeline.config

    @property
    def grid(self) -> tuple[int, int]:
        return self.pipeline.grid

    def drawing_queue(self, config: ServiceConfig, watch: Watch) -> DrawingQueue:
        # a guided picture takes two rows of a block
        block = full_block(self.pipeline.generator.config, self.pipeline.grid) // 2
        return Batcher(
            "drawings",
            partial(draw_block, self.pipeline),
            BatchLimits(config.waiting_drawings, block, config.drawing_window),
            begin=partial(torch.set_num_threads, torch.get_num_threads()),
            key=lambda request: request.drawing.options,
            watch=watch,
        )

    def caption(self, images: Sequence[Image.Image], language: str, on_step: Callable[[], None]) -> list[str]:
        return self.pipeline.caption(images, language, on_step=on_step)

    def rerank(self, prompt: str, images: Sequence[Image.Image], by: Judge) -> list[float]:
        return self.pipeline.rerank(prompt, images, by)

    def upscale(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        return self.pipeline.upscale(images)
