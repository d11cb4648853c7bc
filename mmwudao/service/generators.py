"""What the routes need of a model that draws, describes and answers, and the one that works in this process.

`mmwudao.service.ray.remote` has the one whose work is done by the replicas of Ray Serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from PIL import Image

from generation.captions import OnStep
from generation.drawing.blocks import full_block
from mmwudao.asking import Answer, Asking, ask_picture
from mmwudao.canvas import CanvasFormat
from mmwudao.loading.model_dir import ModelConfig
from mmwudao.pipeline import Pipeline
from mmwudao.service.batching import Batcher, BatchLimits, Watch, WorkQueue
from mmwudao.service.draw_requests import DrawRequest, draw_block
from mmwudao.service.settings import ServiceConfig
from mmwudao.tasks import Judge

DrawingQueue = WorkQueue[DrawRequest, Image.Image]


class Generator(Protocol):
    """A model that draws, and perhaps describes and answers. Its methods block: call them in threads."""

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
    def canvas_format(self) -> CanvasFormat:
        """What a picture to be completed must fit."""

    @property
    def concurrent_tasks(self) -> int:
        """How many calls of `caption`, `ask`, `rerank` and `upscale` may run at a time."""

    def drawing_queue(self, config: ServiceConfig, watch: Watch) -> DrawingQueue:
        """A queue, not yet started, that draws."""

    def read_part(self, text: str) -> str | None:
        """What the model reads of a text that is too long for it; None: all."""

    # `on_step` is called again and again while these work: an exception that it raises ends them
    def caption(self, images: Sequence[Image.Image], language: str | None, on_step: OnStep) -> list[str]:
        """A description of each picture; see `tasks.caption_pictures`."""

    def ask(self, image: Image.Image, asking: Asking, on_step: OnStep) -> list[Answer]:
        """The answers to questions about a picture; see `asking.ask_picture`."""

    def rerank(self, prompt: str, images: Sequence[Image.Image], by: Judge, on_step: OnStep) -> list[float]:
        """How well each picture shows the prompt; see `tasks.score_pictures`."""

    def upscale(self, images: Sequence[Image.Image], on_step: OnStep) -> list[Image.Image]:
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

    @property
    def canvas_format(self) -> CanvasFormat:
        return self.pipeline.canvas_format

    def drawing_queue(self, config: ServiceConfig, watch: Watch) -> DrawingQueue:
        # a guided picture takes two rows of a block
        block = full_block(self.pipeline.generator.config, self.pipeline.grid) // 2
        return Batcher(
            "drawings",
            partial(draw_block, self.pipeline),
            BatchLimits(config.waiting_drawings, block, config.drawing_window),
            begin=partial(torch.set_num_threads, torch.get_num_threads()),
            key=lambda request: request.key,
            watch=watch,
        )

    def read_part(self, text: str) -> str | None:
        return self.pipeline.read_part(text)

    def caption(self, images: Sequence[Image.Image], language: str | None, on_step: OnStep) -> list[str]:
        return self.pipeline.caption(images, language, on_step=on_step)

    def ask(self, image: Image.Image, asking: Asking, on_step: OnStep) -> list[Answer]:
        return ask_picture(self.pipeline, image, asking, on_step)

    def rerank(self, prompt: str, images: Sequence[Image.Image], by: Judge, on_step: OnStep) -> list[float]:
        return self.pipeline.rerank(prompt, images, by, on_step)

    def upscale(self, images: Sequence[Image.Image], on_step: OnStep) -> list[Image.Image]:
        return self.pipeline.upscale(images, on_step=on_step)
