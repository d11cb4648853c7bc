"""`embed_shards` on a Ray cluster, through Ray Data: a row is a shard, and an actor with the towers writes its part.

What a part holds, how it appears and what a second run finds is `retrieval.vectors.embed`'s, which does the work; Ray gives
shards to actors, starts a killed actor again and gives it its shard again. Ray Data's own checkpoints are not used:
whole parts are the record of what is done.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from data.reading import ShardSpec
from data.sample import DataError
from retrieval.cluster import connected
from retrieval.towers.base import Towers
from retrieval.vectors.embed import SETTINGS, EmbedReport, claim_parts, report_parts, write_parts


class ShardWorker:
    """An actor: the towers, and what `write_parts` is told besides them."""

    def __init__(self, towers: Any, device: str, options: dict[str, Any]) -> None:
        import ray

        self._towers: Towers = ray.get(towers).to(device)
        self._options = options

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """How many samples there were, or what the user should know: a cause does not travel with Ray's errors."""
        samples = 0

        def count() -> None:
            nonlocal samples
            samples += 1

        shard, part = Path(row["shard"]), Path(row["part"])
        try:
            for path in (part.parent / SETTINGS, shard):
                if not path.exists():
                    raise DataError(f"not every machine sees {path}: give folders that they share")
            write_parts(self._towers, {shard: part}, on_sample=count, **self._options)
        except (DataError, OSError) as error:
            return {"samples": samples, "problem": str(error)}
        return {"samples": samples, "problem": ""}


def embed_shards_on_cluster(
    towers: Towers,
    spec: ShardSpec,
    out: Path | str,
    address: str,
    *,
    replicas: int | None = None,
    device: str = "auto",
    split: str | None = None,
    images: bool = True,
    texts: bool = True,
    dtype: str = "float32",
    batch_size: int = 64,
    workers: int | None = None,
    progress: bool = False,
) -> EmbedReport:
    """`embed_shards` by `replicas` actors of the Ray cluster at `address` (see `retrieval.cluster.connected`).

    `towers` are on the CPU; each actor gets a copy of them. Shards and `out` are on a file system that all machines
    share. `device` is "cpu", "cuda" (a GPU an actor) or "auto": GPUs if the cluster has any. Without `replicas` there
    is an actor a GPU, or a core. The rows are the local command's; vectors differ in the last bits where an actor
    computes with other devices or another number of threads.

    Raises `DataError` as `embed_shards` does, and `ValueError` without Ray or without a cluster.
    """
    if replicas is not None and replicas < 1:
        raise DataError(f"towers need at least one replica, not {replicas}")
    if device not in ("auto", "cpu", "cuda"):
        raise DataError(f"on a cluster the device is auto, cpu or cuda, not {device!r}")
    with connected(address):
        parts = claim_parts(towers, spec, Path(out).absolute(), split, images, texts, dtype, batch_size)
        pending = {shard.absolute(): part for shard, part in parts.items() if not part.exists()}
        options = {"images": images, "texts": texts, "dtype": dtype, "batch_size": batch_size}
        if pending:
            _write(towers, pending, replicas, device, workers, options, progress)
    return report_parts(Path(out), list(parts.values()), len(parts) - len(pending))


def _write(
    towers: Towers,
    parts: dict[Path, Path],
    replicas: int | None,
    device: str,
    workers: int | None,
    options: dict[str, Any],
    progress: bool,
) -> None:
    import ray
    import ray.data
    from tqdm import tqdm

    logging.getLogger("ray.data").setLevel(logging.WARNING)  # its plans are not our users' business
    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    if device == "cuda" and not gpus:
        raise DataError("the cluster has no GPU: give --device cpu")
    use_gpus = device == "cuda" or (device == "auto" and gpus > 0)
    replicas = min(replicas or (gpus if use_gpus else cpus), len(parts))
    cores = max(1, cpus // max(replicas, gpus if use_gpus else cpus))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = [{"shard": str(shard), "part": str(part)} for shard, part in parts.items()]
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        ShardWorker,  # type: ignore[arg-type]  # it makes an object of the class and calls that
        fn_constructor_args=(
            ray.put(towers),
            "cuda" if use_gpus else "cpu",
            {**options, "workers": workers or cores},
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
