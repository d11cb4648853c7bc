"""Metrics for Prometheus: requests, batches and queues."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)  # s
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mmwudao_requests", "Answered requests.", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "mmwudao_request_seconds", "From the headers to the end of the answer.", ["route"],
            buckets=LATENCIES, registry=self.registry,
        )  # fmt: skip
        self.batch_sizes = Histogram(
            "mmwudao_batch_size", "Items that shared a pass.", ["queue"], buckets=SIZES, registry=self.registry
        )
        self.batch_seconds = Counter(
            "mmwudao_batch_seconds", "Time spent in passes.", ["queue"], registry=self.registry
        )
        self.waiting = Gauge("mmwudao_waiting", "Items accepted and not done.", ["queue"], registry=self.registry)
        self.in_flight = Gauge("mmwudao_requests_in_flight", "Requests being answered.", registry=self.registry)
        self.left = Counter(
            "mmwudao_clients_gone", "Requests whose client left before the answer.", ["route"], registry=self.registry
        )

    def watch_batch(self, queue: str, size: int, seconds: float) -> None:
        self.batch_sizes.labels(queue).observe(size)
        self.batch_seconds.labels(queue).inc(seconds)

    def watch_queue(self, queue: str, length: Callable[[], int]) -> None:
        self.waiting.labels(queue).set_function(lambda: float(length()))

    async def exposition(self) -> bytes:
        """What /metrics answers: the metrics of this process, or of the cluster that it is part of."""
        return self.text()

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self.registry)
