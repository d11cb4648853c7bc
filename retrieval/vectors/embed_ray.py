"""`embed_shards` on a Ray cluster, through Ray Data: a row is a shard, and an actor with the towers writes its part.

`retrieval.vectors.embed` does the work: it decides what a part holds, writes it atomically and finds the parts of an
earlier run. Ray assigns shards to actors, restarts an actor that was killed and gives it its shard again. Ray Data's
own checkpoints are not used, since the complete parts record what is done.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.reading import ShardSpec
from data.sample import DataError
from retrieval.cluster import connected
from retrieval.towers.base import Towers
from retrieval.vectors.embed import DEFAULTS, SETTINGS, EmbedReport, claim_parts, report_parts, write_parts
from retrieval.vectors.settings import EmbedSettings, RaySettings


class ShardWorker:
    """An actor that holds the towers and writes the part of one shard at a time."""

    def __init__(self, towers: Any, device: str, settings: EmbedSettings) -> None:
        import ray

        self._towers: Towers = ray.get(towers).to(device)
        self._settings = settings

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The number of samples, and a message for the user, since Ray's errors do not carry the original one."""
        samples = 0

        def count() -> None:
            nonlocal samples
            samples += 1

        shard, part = Path(row["shard"]), Path(row["part"])
        try:
            for path in (part.parent / SETTINGS, shard):
                if not path.exists():
                    raise DataError(f"not every machine sees {path}: give folders that they share")
            write_parts(self._towers, {shard: part}, self._settings, count)
        except (DataError, OSError) as error:
            return {"samples": samples, "problem": str(error)}
        return {"samples": samples, "problem": ""}


def embed_shards_on_cluster(
    towers: Towers,
    spec: ShardSpec,
    out: Path | str,
    cluster: RaySettings,
    settings: EmbedSettings = DEFAULTS,
    *,
    progress: bool = False,
) -> EmbedReport:
    """`embed_shards` with the actors of a Ray cluster (see `retrieval.cluster.connected`).

    `towers` are on the CPU; each actor gets a copy of them. Shards and `out` lie on a file system that all machines
    share. The rows are those of `embed_shards`; vectors differ in their last bits where an actor computes on another
    device or with another number of threads.

    Raises `DataError` as `embed_shards` does, and `ValueError` without Ray or without a cluster.
    """
    with connected(cluster.address):
        parts = claim_parts(towers, spec, Path(out).absolute(), settings)
        pending = {shard.absolute(): part for shard, part in parts.items() if not part.exists()}
        if pending:
            _write(towers, pending, cluster, settings, progress)
    return report_parts(Path(out), list(parts.values()), len(parts) - len(pending))


def _write(
    towers: Towers, parts: dict[Path, Path], cluster: RaySettings, settings: EmbedSettings, progress: bool
) -> None:
    import ray
    import ray.data
    from tqdm import tqdm

    logging.getLogger("ray.data").setLevel(logging.WARNING)  # users need not see its execution plans
    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    if cluster.device == "cuda" and not gpus:
        raise DataError("the cluster has no GPU: give --device cpu")
    use_gpus = cluster.device == "cuda" or (cluster.device == "auto" and gpus > 0)
    replicas = min(cluster.replicas or (gpus if use_gpus else cpus), len(parts))
    cores = max(1, cpus // max(replicas, gpus if use_gpus else cpus))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = [{"shard": str(shard), "part": str(part)} for shard, part in parts.items()]
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        ShardWorker,  # type: ignore[arg-type]  # Ray makes an instance of the class and calls it
        fn_constructor_args=(
            ray.put(towers),
            "cuda" if use_gpus else "cpu",
            replace(settings, workers=settings.workers or cores),
        ),
        compute=ray.data.ActorPoolStrategy(size=replicas, max_tasks_in_flight_per_actor=1),
        num_cpus=cores,
        num_gpus=1 if use_gpus else 0,
    )
    with tqdm(unit=" samples", disable=not progress) as bar:
        for row in done.iter_rows():
            if row["problem"]:
                raise DataError(row["problem"])
            bar.update(row["samples"])
