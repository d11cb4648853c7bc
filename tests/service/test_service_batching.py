"""The micro-batcher: which requests share a batch, and which are refused, dropped, or fail."""

from __future__ import annotations

import asyncio
import threading

import pytest

from mmwudao.service.batching import Batcher, BatchLimits
from mmwudao.service.errors import QueueFull
from mmwudao.service.metrics import Metrics
from mmwudao.service.queues import Served, ServiceQueues
from mmwudao.service.settings import ServiceConfig
from tests.helpers.tiny_towers import ColourTowers


class Recorder:
    """Doubles numbers; remembers its batches, fails for negative ones, and can be held up."""

    def __init__(self):
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()
        self.running = threading.Event()

    def __call__(self, items):
        self.batches.append(list(items))
        self.running.set()
        assert self.go.wait(120)
        if any(item < 0 for item in items):
            raise ValueError("a negative number")
        return [2 * item for item in items]


def with_batcher(scenario, window=0.0, **options):
    """Run `scenario(batcher, run)` on a started batcher; what it returns."""
    run = Recorder()

    async def main():
        batcher = Batcher("numbers", run, BatchLimits(limit=16, max_batch=8, window=window), **options)
        batcher.start()
        try:
            return await scenario(batcher, run)
        finally:
            run.go.set()
            await batcher.stop()

    return asyncio.run(main())


async def ask(batcher, *items):
    async with batcher.reserve(len(items)):
        return await batcher.submit(items)


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def test_requests_share_a_batch_and_get_their_own_results():
    async def scenario(batcher, run):
        results = await asyncio.gather(*(ask(batcher, k, k + 100) for k in range(4)))
        assert results == [[2 * k, 2 * k + 200] for k in range(4)]
        return run.batches

    assert with_batcher(scenario, window=0.01) == [[0, 100, 1, 101, 2, 102, 3, 103]]


def test_a_batch_gathers_while_another_runs_and_is_never_larger_than_asked():
    async def scenario(batcher, run):
        run.go.clear()
        first = asyncio.create_task(ask(batcher, 1))
        await until(run.running.is_set)
        rest = asyncio.create_task(ask(batcher, *range(2, 12)))
        await until(lambda: batcher.reserved == 11)
        run.go.set()
        await asyncio.gather(first, rest)
        assert batcher.reserved == 0
        return run.batches

    assert with_batcher(scenario) == [[1], [2, 3, 4, 5, 6, 7, 8, 9], [10, 11]]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back():
    async def scenario(batcher, run):
        await ask(batcher, 1)
        run.go.clear()
        accepted = asyncio.create_task(ask(batcher, *range(12)))
        await until(lambda: batcher.reserved == 12)
        with pytest.raises(QueueFull, match=r"12 of 16") as refused:
            await ask(batcher, *range(5))
        assert int((refused.value.headers or {})["Retry-After"]) >= 1
        run.go.set()
        assert await accepted == [2 * k for k in range(12)]
        assert await ask(batcher, *range(16)) == [2 * k for k in range(16)]

    with_batcher(scenario)


def test_who_leaves_is_not_computed_and_makes_room():
    async def scenario(batcher, run):
        run.go.clear()
        first = asyncio.create_task(ask(batcher, 1))
        await until(run.running.is_set)
        gone, stays = asyncio.create_task(ask(batcher, 2, 3)), asyncio.create_task(ask(batcher, 4))
        await until(lambda: batcher.reserved == 4)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert batcher.reserved == 2
        run.go.set()
        assert await asyncio.gather(first, stays) == [[2], [8]]
        return run.batches

    assert with_batcher(scenario) == [[1], [4]]


def test_one_bad_item_fails_for_its_own_caller_only():
    async def scenario(batcher, run):
        results = await asyncio.gather(ask(batcher, 1, 2), ask(batcher, 3, -1), ask(batcher, 4), return_exceptions=True)
        assert results[0] == [2, 4]
        assert isinstance(results[1], ValueError)
        assert results[2] == [8]
        assert await ask(batcher, 5) == [10]

    with_batcher(scenario, window=0.01)


def test_only_items_of_one_key_share_a_batch_and_the_oldest_goes_first():
    async def scenario(batcher, run):
        await asyncio.gather(*(ask(batcher, k) for k in (1, 2, 3, 4, 5)))
        return run.batches

    assert with_batcher(scenario, window=0.01, key=lambda item: item % 2) == [[1, 3, 5], [2, 4]]


def test_stopping_finishes_what_was_accepted():
    async def scenario(batcher, run):
        run.go.clear()
        accepted = asyncio.create_task(ask(batcher, 1, 2, 3))
        await until(run.running.is_set)
        stopping = asyncio.create_task(batcher.stop())
        await asyncio.sleep(0.02)
        assert not stopping.done()
        run.go.set()
        await stopping
        assert accepted.done()
        assert accepted.result() == [2, 4, 6]

    with_batcher(scenario)


def test_watchers_hear_of_every_batch():
    heard = []

    async def scenario(batcher, run):
        await ask(batcher, 1, 2, 3)

    with_batcher(scenario, watch=lambda name, size, seconds: heard.append((name, size, seconds >= 0)))
    assert heard == [("numbers", 3, True)]


def test_without_room_for_a_text_or_a_picture_no_body_is_read():
    config = ServiceConfig(max_inputs=1, waiting_texts=1, waiting_images=1)
    queues = ServiceQueues(Served("tiny", ColourTowers().eval()), config, Metrics())

    async def refused(texts: int, images: int, content_type: str) -> bool:
        async with queues.texts.reserve(texts), queues.images.reserve(images):
            try:
                queues.admit("POST", "/v1/embeddings", content_type)
            except QueueFull:
                return True
        return False

    table = {
        (texts, images, kind): asyncio.run(refused(texts, images, kind))
        for texts in (0, 1)
        for images in (0, 1)
        for kind in ("application/json", "multipart/form-data; boundary=x")
    }
    assert [key for key, was in table.items() if was] == [
        (0, 1, "multipart/form-data; boundary=x"),
        (1, 1, "application/json"),
        (1, 1, "multipart/form-data; boundary=x"),
    ]
