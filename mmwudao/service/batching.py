"""Bounded queues, and the micro-batcher: inputs of different requests are computed together, in a thread.

Items with the same key may share a call of `run`. A call takes at most `max_batch` of the waiting items, oldest first;
while it runs, the next batch gathers.
"""

from __future__ import annotations

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from mmwudao.service.errors import QueueFull

Item = TypeVar("Item")
Result = TypeVar("Result")
Watch = Callable[[str, int, float], None]  # is told of every batch: the queue's name, the batch's size, and seconds

LONGEST_RETRY = 60  # s
SMOOTHING = 0.1  # weight of the newest batch in the mean time that an item takes


def _ignore(name: str, size: int, seconds: float) -> None:
    pass


class WorkQueue(ABC, Generic[Item, Result]):
    """Admits at most `limit` items at a time, in `reserve`. Use it inside the event loop that called `start`."""

    def __init__(self, name: str, limit: int, workers: int = 1, watch: Watch = _ignore) -> None:
        self.name, self.limit = name, limit
        self._workers, self._watch = workers, watch
        self._reserved = 0
        self._seconds_per_item = 0.0

    @property
    def reserved(self) -> int:
        """Items admitted and not yet done: being prepared, waiting, or being computed."""
        return self._reserved

    @property
    def full(self) -> bool:
        """Whether there is no room for anything."""
        return self._reserved >= self.limit

    @abstractmethod
    def start(self) -> None:
        """Begin to work on what is submitted."""

    async def stop(self) -> None:
        """Finish what was admitted."""
        while self._reserved:
            await asyncio.sleep(0.01)

    def check_room(self, count: int = 1) -> None:
        """Raises `QueueFull` when there is no room for `count` items."""
        if self._reserved + count > self.limit:
            wait = math.ceil(self._reserved * self._seconds_per_item)
            raise QueueFull(
                f"the queue for {self.name} is full ({self._reserved} of {self.limit}): try again later",
                min(LONGEST_RETRY, max(1, wait)),
            )

    @asynccontextmanager
    async def reserve(self, count: int) -> AsyncIterator[None]:
        """Room for `count` items while the block runs. Raises `QueueFull` at once when there is none."""
        self.check_room(count)
        self._reserved += count
        try:
            yield
        finally:
            self._reserved -= count

    @abstractmethod
    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """The result of each item, for which room was reserved. Cancelling this drops the items not yet begun."""

    def _record(self, size: int, seconds: float) -> None:
        """Note how long a batch took, for `Retry-After` and the metrics."""
        each = seconds / size / self._workers
        if self._seconds_per_item:
            self._seconds_per_item += SMOOTHING * (each - self._seconds_per_item)
        else:
            self._seconds_per_item = each
        self._watch(self.name, size, seconds)


@dataclass(frozen=True)
class BatchLimits:
    """How a `Batcher` batches: a batch that is not full waits `window` seconds for more; `workers` run at a time."""

    limit: int
    max_batch: int = 1
    window: float = 0.0
    workers: int = 1


class _Waiting(NamedTuple, Generic[Item, Result]):
    item: Item
    key: Hashable
    future: asyncio.Future[Result]


class Batcher(WorkQueue[Item, Result]):
    """Runs `run`, which returns one result per item, on items of many callers.

    `begin` is called first in each worker thread.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[list[Item]], Sequence[Result]],
        limits: BatchLimits,
        *,
        begin: Callable[[], None] | None = None,
        key: Callable[[Item], Hashable] = lambda item: None,
        watch: Watch = _ignore,
    ) -> None:
        super().__init__(name, limits.limit, limits.workers, watch)
        self._run, self._begin, self._key, self._limits = run, begin, key, limits
        self._waiting: deque[_Waiting[Item, Result]] = deque()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._arrived = asyncio.Event()
        self._executor = ThreadPoolExecutor(self._workers, thread_name_prefix=self.name, initializer=self._begin)
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self._workers)]

    async def stop(self) -> None:
        """Finish what was admitted, then end the threads."""
        await super().stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._executor.shutdown)

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """See `WorkQueue.submit`."""
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
                    future.exception()  # asyncio warns of exceptions that nobody retrieves

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            if self._limits.window and len(self._waiting) < self._limits.max_batch:
                await asyncio.sleep(self._limits.window)
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
            self._record(len(batch), time.perf_counter() - started)

    def _take(self) -> list[_Waiting[Item, Result]]:
        """Take the oldest item and those with its key out of the queue; items whose caller has left are dropped."""
        batch: list[_Waiting[Item, Result]] = []
        others: list[_Waiting[Item, Result]] = []
        while self._waiting and len(batch) < self._limits.max_batch:
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
        """Run each item of a failed batch by itself, so that one client's input fails for that client only."""
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


def _settle(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():
        future.set_result(result)
