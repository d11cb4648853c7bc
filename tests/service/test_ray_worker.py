"""The generator of Ray Serve's replicas and its client, without Ray between them."""

from __future__ import annotations

import asyncio
import pickle
import threading
from functools import partial
from typing import Any, cast

import pytest
import torch
from PIL import Image

from generation.drawing.sampling import SamplingOptions
from mmwudao.loading.model_dir import ModelConfig
from mmwudao.pipeline import load
from mmwudao.planning import plan
from mmwudao.service.draw_requests import DrawRequest
from mmwudao.service.errors import BadInput, QueueFull, ReplicaLost
from mmwudao.service.settings import ServiceConfig

ray = pytest.importorskip("ray")

from mmwudao.service.ray.remote import (  # noqa: E402
    GeneratorDescription,
    GeneratorWorker,
    RemoteDrawings,
    RemoteGenerator,
)

DESCRIPTION = GeneratorDescription("tiny", ModelConfig("tiny", 32, (), ("en",), SamplingOptions(), {}), (4, 4))


class Response:
    """As Ray Serve's, of a streaming call."""

    def __init__(self, generator):
        self.generator, self.cancelled = generator, False

    def __aiter__(self):
        return self.generator

    def cancel(self):
        self.cancelled = True


class Handle:
    """As Ray Serve's, to one worker in this process."""

    def __init__(self, worker):
        self.worker, self.responses = worker, []
        self.draw = self

    def options(self, stream):
        assert stream
        return self

    def remote(self, wanted):
        self.responses.append(Response(self.worker.draw(wanted)))
        return self.responses[-1]


def test_drawings_are_those_of_the_pipeline(tiny_model_dir):
    pipeline = load(tiny_model_dir, "cpu", "float32")

    async def draw():
        worker = GeneratorWorker("tiny", pipeline, ServiceConfig())
        handle = Handle(worker)
        remote = RemoteGenerator(cast(Any, handle), await worker.describe(), 1)
        assert (remote.grid, remote.config) == (pipeline.grid, pipeline.config)
        drawings = plan(remote.config, "红心", 3, seed=5)
        assert drawings == pipeline.plan("红心", 3, seed=5)
        shown = []
        queue = remote.drawing_queue(ServiceConfig(max_pictures=4, waiting_drawings=4), lambda *_: None)
        requests = [
            DrawRequest(one, partial(lambda k, image: shown.append((k, image.size)), k), frozenset({1, 3}))
            for k, one in enumerate(drawings)
        ]
        async with queue.reserve(3):
            images = await queue.submit(requests)
            with pytest.raises(QueueFull):
                async with queue.reserve(2):
                    pass
        assert handle.responses[0].cancelled
        return images, shown

    images, shown = asyncio.run(draw())
    assert sorted(shown) == sorted([(k, (32, 32)) for k in range(3)] * 2)
    for image, expected in zip(images, pipeline.generate("红心", 3, seed=5), strict=True):
        assert image.tobytes() == expected.tobytes()
        assert image.info == expected.info


def test_a_client_that_leaves_stops_the_drawing(tiny_model_dir):
    pipeline = load(tiny_model_dir, "cpu", "float32")
    begun, go_on, stopped = threading.Event(), threading.Event(), threading.Event()

    def draw(drawings, on_token):
        begun.set()
        go_on.wait(30)
        try:
            on_token(1, torch.zeros(1, 4, 4))
        except Exception:
            stopped.set()
            raise
        return []

    pipeline.draw = draw  # type: ignore[method-assign, assignment]

    async def leave():
        worker = GeneratorWorker("tiny", pipeline, ServiceConfig())
        stream = worker.draw([(one, frozenset()) for one in pipeline.plan("红心", 1)])
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.to_thread(begun.wait, 30)
        waiting.cancel()  # as Ray does with a cancelled call
        await asyncio.gather(waiting, return_exceptions=True)
        go_on.set()
        assert await asyncio.to_thread(stopped.wait, 30)

    asyncio.run(leave())


def test_a_lost_generator_is_a_503():
    class Gone:
        draw = caption = rerank = upscale = property(lambda self: self)

        def options(self, stream):
            return self

        def remote(self, *_):
            return self

        def result(self, timeout_s=None):
            raise ray.exceptions.RayActorError

        async def __aiter__(self):
            raise ray.exceptions.RayActorError
            yield

        def cancel(self):
            pass

    with pytest.raises(ReplicaLost, match="try again"):
        asyncio.run(RemoteDrawings(cast(Any, Gone()), 1).submit([]))
    generator = RemoteGenerator(cast(Any, Gone()), DESCRIPTION, 1)
    for call in (
        lambda: generator.caption([], "en", lambda: None),
        lambda: generator.rerank("red", [], "caption"),
        lambda: generator.upscale([]),
    ):
        with pytest.raises(ReplicaLost, match="try again"):
            call()


def test_a_client_that_leaves_cancels_a_caption():
    class Slow:
        caption = property(lambda self: self)
        cancelled = False

        def remote(self, *_):
            return self

        def result(self, timeout_s):
            raise TimeoutError

        def cancel(self):
            self.cancelled = True

    def leave():
        looks.append(1)
        if len(looks) == 3:
            raise asyncio.CancelledError

    looks: list[int] = []
    slow = Slow()
    with pytest.raises(asyncio.CancelledError):
        RemoteGenerator(cast(Any, slow), DESCRIPTION, 1).caption([], "en", leave)
    assert slow.cancelled


def test_a_users_mistake_keeps_its_message_on_the_way(tiny_model_dir):
    """It is a `ServiceError` when it leaves the worker, survives pickling, and Ray's wrapper is taken off."""
    pipeline = load(tiny_model_dir, "cpu", "float32")

    async def ask() -> Exception:
        worker = GeneratorWorker("tiny", pipeline, ServiceConfig())
        with pytest.raises(BadInput, match="unknown language 'tlh'") as refused:
            await worker.caption([Image.new("RGB", (8, 8))], "tlh")
        return refused.value

    error = pickle.loads(pickle.dumps(asyncio.run(ask())))
    wrapped = ray.exceptions.RayTaskError("caption", "Traceback ...", error).as_instanceof_cause()

    class Refusing:
        rerank = property(lambda self: self)

        def remote(self, *_):
            return self

        def result(self):
            raise wrapped

    with pytest.raises(BadInput) as refused:
        RemoteGenerator(cast(Any, Refusing()), DESCRIPTION, 1).rerank("red", [], "caption")
    assert str(refused.value) == str(error)
    assert refused.value.status_code == 400
