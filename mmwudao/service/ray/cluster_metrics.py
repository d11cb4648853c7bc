"""The metrics of all replicas at one address: each reports its own to an actor, and any of them answers with all.

Every sample gets the label `replica`, by which Prometheus adds them up as it does for processes of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray import serve

from mmwudao.service.metrics import Metrics

BOARD = "mmwudao-metrics"  # the actor's name
REPORT_EVERY = 2.0  # s
FORGET_AFTER = 30.0  # s without a report: the replica has ended

log = logging.getLogger(__name__)


class Board:
    """What each replica has reported last."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[float, bytes]] = {}

    def report(self, replica: str, text: bytes) -> None:
        self._told[replica] = time.monotonic(), text

    def texts(self) -> dict[str, bytes]:
        """Replica -> its metrics, of those that still report."""
        now = time.monotonic()
        self._told = {name: one for name, one in self._told.items() if now - one[0] < FORGET_AFTER}
        return {name: text for name, (_, text) in self._told.items()}


def merged(texts: Mapping[str, bytes]) -> bytes:
    """One exposition of several, in which each sample has the label `replica`, a key of `texts`."""

    class Merged(Collector):
        def collect(self) -> Iterator[Metric]:
            families: dict[str, Metric] = {}
            for replica, text in sorted(texts.items()):
                for family in text_string_to_metric_families(text.decode()):
                    whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                    for sample in family.samples:
                        whole.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
            yield from families.values()

    registry = CollectorRegistry()
    registry.register(Merged())
    return generate_latest(registry)


class ClusterMetrics(Metrics):
    """The metrics of a replica, which it reports to the board; its exposition is that of all replicas."""

    def __init__(self) -> None:
        super().__init__()
        self._replica = str(serve.get_replica_context().replica_tag)
        actor = ray.remote(num_cpus=0)(Board).options(
            name=BOARD, namespace=BOARD, get_if_exists=True, lifetime="detached"
        )
        self._board: Any = actor.remote()
        threading.Thread(target=self._report, name="metrics", daemon=True).start()

    def _report(self) -> None:
        while True:
            try:
                ray.get(self._board.report.remote(self._replica, self.text()))
            except ray.exceptions.RayError as error:  # the next report may come through
                log.warning("the metrics were not reported: %s", " ".join(str(error).split())[:200])
            time.sleep(REPORT_EVERY)

    async def exposition(self) -> bytes:
        texts = {**await self._board.texts.remote(), self._replica: self.text()}
        return merged(texts)


def close_board() -> None:
    """End the actor, if there is one."""
    try:
        ray.kill(ray.get_actor(BOARD, namespace=BOARD))
    except ValueError:  # no replica has made one
        return
