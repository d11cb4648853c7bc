"""The generator of Ray Serve's replicas and its client, without Ray between them."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from functools import partial
from typing import Any, cast

import pytest
import torch
from PIL import Image

from generation.drawing.sampling import SamplingOptions
from mmwudao.canvas import CanvasFormat, masked_canvas
from mmwudao.loading.model_dir import ModelConfig
from mmwudao.pipeline import load
from mmwudao.planning import plan
from mmwudao.service.draw_requests import DrawRequest
from mmwudao.service.errors import BadInput, QueueFull, ReplicaLost
from mmwudao.service.settings import ServiceConfig

ray = pytest.importorskip("ray")

from mmwudao.service.metrics import Metrics  # noqa: E402
from mmwudao.service.ray.cluster_metrics import Board, merged  # noqa: E402
from mmwudao.service.ray.remote import (  # noqa: E402
    GeneratorDescription,
    GeneratorWorker,
    RemoteDrawings,
    RemoteGenerator,
)

CONFIG = ModelConfig(
    name="tiny", image_size=32, styles=(), languages=("en",), default_sampling=SamplingOptions(), parts={}
)
DESCRIPTION = GeneratorDescription("tiny", CONFIG, (4, 4), CanvasFormat(32, (4, 4), False), 8)


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


def test_pictures_of_one_canvas_stay_together_on_their_way():
    canvas = masked_canvas(CanvasFormat(32, (4, 4), True), Image.new("RGB", (32, 32)), "left:0.5")
    drawings = plan(CONFIG, "cat", 2, seed=1)
    sent = pickle.loads(pickle.dumps([(one, frozenset(), canvas) for one in drawings]))
    first, second = (DrawRequest(drawing, canvas=there) for drawing, _, there in sent)
    assert first.key == second.key != DrawRequest(drawings[0], canvas=canvas).key


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

    def draw(drawings, on_token, canvas):
        begun.set()
        go_on.wait(120)
        try:
            on_token(1, torch.zeros(1, 4, 4))
        except Exception:
            stopped.set()
            raise
        return []

    pipeline.draw = draw  # type: ignore[method-assign, assignment]

    async def leave():
        worker = GeneratorWorker("tiny", pipeline, ServiceConfig())
        stream = worker.draw([(one, frozenset(), None) for one in pipeline.plan("红心", 1)])
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.to_thread(begun.wait, 30)
        waiting.cancel()  # as Ray does with a cancelled call
        await asyncio.gather(waiting, return_exceptions=True)
        go_on.set()
        assert await asyncio.to_thread(stopped.wait, 30)

    asyncio.run(leave())


def test_a_lost_generator_is_a_503():
    class Gone:
        draw = caption = rerank = upscale = read_part = property(lambda self: self)

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
        lambda: generator.rerank("red", [], "caption", lambda: None),
        lambda: generator.upscale([], lambda: None),
        lambda: generator.read_part("a text of more bytes than pieces"),
    ):
        with pytest.raises(ReplicaLost, match="try again"):
            call()


@pytest.mark.parametrize(
    ("method", "arguments"), [("caption", ([], "en")), ("rerank", ("red", [], "caption")), ("upscale", ([],))]
)
def test_a_client_that_leaves_cancels_what_is_long(method, arguments):
    class Slow:
        caption = rerank = upscale = property(lambda self: self)
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
        getattr(RemoteGenerator(cast(Any, slow), DESCRIPTION, 1), method)(*arguments, leave)
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

        def result(self, timeout_s):
            raise wrapped

        def cancel(self):
            pass

    with pytest.raises(BadInput) as refused:
        RemoteGenerator(cast(Any, Refusing()), DESCRIPTION, 1).rerank("red", [], "caption", lambda: None)
    assert str(refused.value) == str(error)
    assert refused.value.status_code == 400


def test_a_client_that_leaves_stops_the_judging_in_the_replica(tiny_model_dir, monkeypatch):
    """The worker's job ends at its next step once the call is cancelled."""
    pipeline, ended, begun = load(tiny_model_dir, "cpu", "float32"), threading.Event(), threading.Event()

    def endless(prompt, images, by, on_step):
        begun.set()
        try:
            while True:
                on_step()
                time.sleep(0.001)
        finally:
            ended.set()

    monkeypatch.setattr(pipeline, "rerank", endless)

    async def leave() -> None:
        worker = GeneratorWorker("tiny", pipeline, ServiceConfig())
        call = asyncio.create_task(worker.rerank("red", [], "caption"))
        await asyncio.to_thread(begun.wait, 30)
        call.cancel()
        assert await asyncio.to_thread(ended.wait, 30)

    asyncio.run(leave())


def test_the_metrics_of_replicas_are_told_apart():
    board = Board()
    for replica, count in (("a", 2), ("b", 3)):
        metrics = Metrics()
        metrics.watch_batch("texts", 4, 0.5)
        metrics.requests.labels("GET", "/healthz", "200").inc(count)
        board.report(replica, metrics.text())
    lines = merged(board.texts()).decode().splitlines()
    for replica, count in (("a", 2), ("b", 3)):
        assert (
            f'mmwudao_requests_total{{method="GET",replica="{replica}",route="/healthz",status="200"}} {count}.0'
            in lines
        )
        assert f'mmwudao_batch_size_bucket{{le="4.0",queue="texts",replica="{replica}"}} 1.0' in lines
    assert sum(line == "# TYPE mmwudao_requests_total counter" for line in lines) == 1
