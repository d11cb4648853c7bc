"""The micro-batcher: what different requests ask for is computed together, in a thread, behind a bounded queue.

Items of one key may share a call of `run`. A call takes what waits, at most `max_batch`, oldest first; while it runs,
the next batch gathers.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Generic, NamedTuple, TypeVar

from mmwudao.service.errors import Busy

Item = TypeVar("Item")
Result = TypeVar("Result")

LONGEST_RETRY = 60  # s
SMOOTHING = 0.1  # weight of the newest batch in the mean time that an item takes


class _Waiting(NamedTuple, Generic[Item, Result]):
    item: Item
    key: Hashable
    future: asyncio.Future[Result]


class Batcher(Generic[Item, Result]):
    """Runs `run`, which gives one result an item, on items of many callers.

    `limit` items are admitted at a time, in `reserve`; `window` is how many seconds a batch that is not full waits for
    more. `begin` is called first in each of the `workers` threads; `watch(name, size, seconds)` is told of every batch.
    Use it inside the event loop that called `start`.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[list[Item]], Sequence[Result]],
        *,
        max_batch: int,
        limit: int,
        window: float = 0.0,
        workers: int = 1,
        begin: Callable[[], None] = lambda: None,
        key: Callable[[Item], Hashable] = lambda item: None,
        watch: Callable[[str, int, float], None] = lambda name, size, seconds: None,
    ) -> None:
        self.name, self.limit = name, limit
        self._run, self._begin, self._key, self._watch = run, begin, key, watch
        self._max_batch, self._window, self._workers = max_batch, window, workers
        self._reserved = 0
        self._seconds_an_item = 0.0
        self._waiting: deque[_Waiting[Item, Result]] = deque()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def reserved(self) -> int:
        """Items admitted and not yet done: those that are still being prepared, that wait, and that are computed."""
        return self._reserved

    def start(self) -> None:
        self._arrived = asyncio.Event()
        self._executor = ThreadPoolExecutor(self._workers, thread_name_prefix=self.name, initializer=self._begin)
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self._workers)]

    async def stop(self) -> None:
        """Finish what was admitted, then end the threads."""
        while self._reserved:
            await asyncio.sleep(0.01)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._executor.shutdown)

    @asynccontextmanager
    async def reserve(self, count: int) -> AsyncIterator[None]:
        """Room for `count` items while the block runs. Raises `Busy` at once when there is none."""
        if self._reserved + count > self.limit:
            wait = math.ceil(self._reserved * self._seconds_an_item)
            raise Busy(
                f"the queue for {self.name} is full ({self._reserved} of {self.limit}): try again later",
                min(LONGEST_RETRY, max(1, wait)),
            )
        self._reserved += count
        try:
            yield
        finally:
            self._reserved -= count

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """The result of each item, for which room was reserved. Items of a caller that is cancelled are not begun."""
        loop = asyncio.get_running_loop()
        entries = [_Waiting[Item, Result](item, self._key(item), loop.create_future()) for item in items]
        self._waiting.extend(entries)
        self._arrived.set()
        futures = [entry.future for entry in entries]
        try:
            return [await future for future in futures]
        finally:
            for future in futures:
                if not future.cancel() and not future.cancelled():
                    future.exception()  # looked at, so that asyncio does not complain of those behind the first

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            if self._window and len(self._waiting) < self._max_batch:
                await asyncio.sleep(self._window)
            batch = self._take()
            if not batch:
                continue
            started = time.perf_counter()
            try:
                results = await loop.run_in_executor(self._executor, self._compute, batch)
            except Exception as error:
                await self._run_alone(batch, error)
            else:
                for entry, result in zip(batch, results, strict=True):
                    _settle(entry.future, result)
            self._note(len(batch), time.perf_counter() - started)

    def _take(self) -> list[_Waiting[Item, Result]]:
        """The oldest item and those behind it with its key, out of the queue; who has left is dropped."""
        batch: list[_Waiting[Item, Result]] = []
        others: list[_Waiting[Item, Result]] = []
        while self._waiting and len(batch) < self._max_batch:
            entry = self._waiting.popleft()
            if entry.future.done():
                continue
            (batch if not batch or entry.key == batch[0].key else others).append(entry)
        self._waiting.extendleft(reversed(others))
        return batch

    def _compute(self, batch: list[_Waiting[Item, Result]]) -> Sequence[Result]:
        results = self._run([entry.item for entry in batch])
        assert len(results) == len(batch), f"{self.name}: {len(results)} results for {len(batch)} items"
        return results

    async def _run_alone(self, batch: list[_Waiting[Item, Result]], error: Exception) -> None:
        """After a batch failed: each item by itself, so that one client's input fails for that client only."""
        loop = asyncio.get_running_loop()
        for entry in batch:
            if entry.future.done():
                continue
            if len(batch) == 1:
                entry.future.set_exception(error)
                return
            try:
                results = await loop.run_in_executor(self._executor, self._compute, [entry])
            except Exception as own:
                if not entry.future.done():
                    entry.future.set_exception(own)
            else:
                _settle(entry.future, results[0])

    def _note(self, size: int, seconds: float) -> None:
        each = seconds / size / self._workers
        if self._seconds_an_item:
            self._seconds_an_item += SMOOTHING * (each - self._seconds_an_item)
        else:
            self._seconds_an_item = each
        self._watch(self.name, size, seconds)


def _settle(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():
        future.set_result(result)
