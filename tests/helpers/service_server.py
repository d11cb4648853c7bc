"""What the service's tests share: a collection in memory, tiny models, and a real server on a free port."""

from __future__ import annotations

import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
import uvicorn
from PIL import Image

from mmwudao.pipeline import Pipeline, load
from mmwudao.service.generators import LocalGenerator
from mmwudao.service.queues import Served
from mmwudao.service.server import make_server
from mmwudao.service.settings import ServiceConfig
from retrieval.collections.opening import Collection, CollectionError, ExistingIdsError, Hit, Item
from tests.helpers.tiny_towers import ColourTowers


class MemoryCollection(Collection):
    """A dictionary of items. `where` knows `NAME = 'VALUE'` and nothing else."""

    def __init__(self, dim: int = 8, model: str = "") -> None:
        self.dim, self.model = dim, model
        self.items: dict[str, Item] = {}

    def close(self) -> None:
        self.items = {}

    def add(self, items: Sequence[Item]) -> None:
        there = [item.id for item in items if item.id in self.items]
        if there:
            raise ExistingIdsError(f"ids that are there already: {', '.join(there)}")
        self.upsert(items)

    def upsert(self, items: Sequence[Item]) -> None:
        for item in items:
            unit = item.vector / numpy.linalg.norm(item.vector)
            self.items[item.id] = Item(item.id, unit.astype(numpy.float32), dict(item.metadata))

    def delete(self, ids: Sequence[str]) -> int:
        return sum(self.items.pop(one, None) is not None for one in ids)

    def get(self, ids: Sequence[str]) -> list[Item]:
        return [self.items[one] for one in ids if one in self.items]

    def search(self, vector: numpy.ndarray, k: int = 10, where: str | None = None) -> list[Hit]:
        query = vector / numpy.linalg.norm(vector)
        hits = [Hit(item.id, float(item.vector @ query), item.metadata) for item in self._allowed(where)]
        return sorted(hits, key=lambda hit: -hit.score)[:k]

    def count(self, where: str | None = None) -> int:
        return len(self._allowed(where))

    def scan(self, where: str | None = None) -> Iterator[tuple[list[str], numpy.ndarray]]:
        for item in self._allowed(where):
            yield [item.id], item.vector[None]

    def snapshot(self, name: str) -> None:
        raise CollectionError("no snapshots in memory")

    def restore(self, name: str) -> None:
        raise CollectionError("no snapshots in memory")

    def drop_snapshot(self, name: str) -> None:
        raise CollectionError("no snapshots in memory")

    def snapshots(self) -> list[str]:
        return []

    def optimise(self) -> None:
        pass

    def _allowed(self, where: str | None) -> list[Item]:
        if where is None:
            return list(self.items.values())
        name, equals, value = where.partition(" = ")
        if not equals:
            raise CollectionError("a condition is NAME = 'VALUE'")
        return [item for item in self.items.values() if item.metadata.get(name) == value.strip("'")]


def tiny_pipeline(folder: Path) -> Pipeline:
    return load(folder, device="cpu", dtype="float32")


def tiny_served(folder: Path) -> Served:
    """Everything there is to serve, called "tiny"."""
    return Served("tiny", ColourTowers().eval(), LocalGenerator(tiny_pipeline(folder)), MemoryCollection())


@contextlib.contextmanager
def running(served: Served, config: ServiceConfig | None = None) -> Iterator[str]:
    """A real server in a thread; yields its address, http://127.0.0.1:PORT."""
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server: uvicorn.Server = make_server(served, config or ServiceConfig(), "127.0.0.1", port)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            late = time.monotonic() + 120
            while not server.started:
                assert thread.is_alive()
                assert time.monotonic() < late, "the server does not start"
                time.sleep(0.01)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(120)
            assert not thread.is_alive(), "the server does not stop"


def png(colour: str | tuple[int, int, int] = "red", size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(encoded: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
