"""What a collection's search finds and costs: recall@10 against exact search, latency and CPU a query, with filters.

    python -m bench.speed.collection_speed [--items 1000000] [--dim 512] [--queries 200] [--place FOLDER] [--exact]
    python -m bench.speed.collection_speed --items 1000000 --place FOLDER --steps add,optimise   # then --steps query

Items are noisy points around `--clusters` centres, queries likewise, so that there are neighbours to be found (vectors
that are uniformly random have none, and no model makes such). Filters allow 10 %, 1 % and 0.1 % of the items. `--place`
keeps the collection, and beside it the true neighbours of the queries (FOLDER.truth.npz); adding goes on after the
items that are there. `--exact` measures without an index. CPU is that of the whole process, all threads: on busy cores
it says more than the time. Of each filter, "first" is the first search after the collection was opened and warm, the
rest of a line the searches with the same filter that follow. `--defaults FOLDER` measures LanceDB's own index and
search of the same vectors beside it, in a copy of the place: an IvfPq of cosines, and `search(...).where(...)` with
BTree indexes of the columns. The table has a line for each filter, and the JSON line all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lancedb
import numpy
import pyarrow as pa
from lancedb.index import IvfPq
from numpy.typing import NDArray

from retrieval.collections import lance, lance_index, lance_search
from retrieval.collections.opening import Collection, Hit, open_collection

FILTERS = {"all": None, "10 %": "bucket < 100", "1 %": "bucket < 10", "0.1 %": "bucket < 1"}
Search = Callable[[NDArray[numpy.float32], int, str | None], Sequence[Hit] | pa.Table]
STEPS = ("add", "optimise", "query")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--clusters", type=int, help="default: one for 1,000 items")
    parser.add_argument("--batch", type=int, default=100_000, help="rows that are added at once")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--place", type=Path, help="default: a temporary folder")
    parser.add_argument("--steps", default=",".join(STEPS), help="which of add, optimise and query")
    parser.add_argument("--exact", action="store_true", help="build no index")
    parser.add_argument("--defaults", type=Path, help="a copy of the collection's folder, which gets LanceDB's index")
    parser.add_argument("--rows-a-partition", type=int, default=lance_index.ROWS_A_PARTITION)
    parser.add_argument("--refine", type=int, default=lance_search.REFINE)
    parser.add_argument("--exact-up-to", type=int, default=lance_search.EXACT_UP_TO)
    arguments = parser.parse_args()
    steps = arguments.steps.split(",")
    if not set(steps) <= set(STEPS):
        parser.error(f"--steps are some of {','.join(STEPS)}")
    arguments.clusters = arguments.clusters or max(1, arguments.items // 1000)
    lance_index.ROWS_A_PARTITION, lance_search.REFINE = arguments.rows_a_partition, arguments.refine
    lance_search.EXACT_UP_TO = arguments.items if arguments.exact else arguments.exact_up_to
    record: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.place or Path(folder) / "c"
        with open_collection(place, create=True, dim=arguments.dim) as collection:
            if "add" in steps:
                record |= add(collection, arguments)
            if "optimise" in steps:
                record |= optimise(collection)
            if "query" in steps:
                queries = points(arguments, arguments.queries, seed=-1)
                nearest = true_neighbours(place, queries, arguments)
                record["filters"] = measure_filters(collection.search, queries, nearest, arguments.k)
                if arguments.defaults:
                    search, built = lancedb_defaults(arguments.defaults)
                    record["defaults"] = built | measure_filters(search, queries, nearest, arguments.k)
    options = {name: value for name, value in vars(arguments).items() if name not in ("place", "defaults")}
    gigabytes = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    print(
        json.dumps(
            {**options, "cores": os.cpu_count(), "load": os.getloadavg()[0], "most_memory_GiB": gigabytes, **record}
        )
    )


def points(arguments: argparse.Namespace, count: int, seed: int) -> NDArray[numpy.float32]:
    """Unit vectors [count, D] around centres that are the same for every seed."""
    centres = numpy.random.default_rng(0).standard_normal((arguments.clusters, arguments.dim), numpy.float32)
    rng = numpy.random.default_rng(seed + 2)
    vectors = centres[rng.integers(arguments.clusters, size=count)]
    vectors += rng.standard_normal(vectors.shape, numpy.float32)
    vectors /= numpy.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def stored(arguments: argparse.Namespace, step: str, first: int = 0) -> Iterator[tuple[int, NDArray[numpy.float32]]]:
    """The first number and the vectors of each batch of items, from item `first` on."""
    for start in range(first, arguments.items, arguments.batch):
        yield start, points(arguments, min(arguments.batch, arguments.items - start), seed=start)
        print(f"{step}: {min(start + arguments.batch, arguments.items)} of {arguments.items}", file=sys.stderr)


def buckets(start: int, count: int) -> NDArray[numpy.int64]:
    """The buckets 0 to 999 are spread over items and clusters, since 7919 is prime."""
    return numpy.arange(start, start + count) * 7919 % 1000


def add(collection: Collection, arguments: argparse.Namespace) -> dict[str, object]:
    first, adding, busy = collection.count(), 0.0, 0.0
    for start, vectors in stored(arguments, "add", first):
        count = len(vectors)
        table = pa.table(
            {
                "id": pa.array([str(number) for number in range(start, start + count)]),
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), arguments.dim),
                "bucket": buckets(start, count),
            }
        )
        started, cpu = time.perf_counter(), time.process_time()
        collection.add(table)
        adding += time.perf_counter() - started
        busy += time.process_time() - cpu
    added = arguments.items - first
    if added <= 0:
        return {}
    return {"add_s": round(adding, 2), "add_cpu_s": round(busy, 2), "added_per_s": round(added / adding)}


def optimise(collection: Collection) -> dict[str, object]:
    started, busy = time.perf_counter(), time.process_time()
    collection.optimise()
    took, busy = time.perf_counter() - started, time.process_time() - busy
    print(f"optimise: {took:.1f} s", file=sys.stderr)
    return {"optimise_s": round(took, 2), "optimise_cpu_s": round(busy, 2)}


def true_neighbours(
    place: Path, queries: NDArray[numpy.float32], arguments: argparse.Namespace
) -> dict[str, NDArray[numpy.float32]]:
    """For each filter the similarities [Q, k] of the nearest items, in no order; one pass over all vectors."""
    path = place.with_name(f"{place.name}.truth.npz")
    made_of = [getattr(arguments, name) for name in ("items", "dim", "clusters", "batch", "queries", "k")]
    if path.is_file():
        with numpy.load(path) as kept:
            if kept["made_of"].tolist() == made_of:
                return {name: kept[name] for name in FILTERS}
    nearest = {name: numpy.full((len(queries), arguments.k), -numpy.inf, numpy.float32) for name in FILTERS}
    for start, vectors in stored(arguments, "compare"):
        numbers = buckets(start, len(vectors))
        scores = queries @ vectors.T
        for name, where in FILTERS.items():
            allowed = scores if where is None else scores[:, numbers < int(where.split()[-1])]
            both = numpy.concatenate([nearest[name], allowed], axis=1)
            nearest[name] = numpy.partition(both, -arguments.k, axis=1)[:, -arguments.k :]
    with path.open("wb") as file:
        numpy.savez(file, allow_pickle=False, made_of=numpy.array(made_of), **nearest)
    return nearest


def measure_filters(
    search: Search, queries: NDArray[numpy.float32], nearest: dict[str, NDArray[numpy.float32]], k: int
) -> dict[str, dict[str, float]]:
    for query in queries:
        search(query, k, None)  # warm: the parts of an index are read when they are first searched
    results = {}
    print("allowed    recall@k  least  first ms  median ms  95 % ms  CPU ms")
    for name, where in FILTERS.items():
        result = results[name] = measure(search, queries, nearest[name], k, where)
        print(
            f"{name:9}  {result['recall']:8.4f}  {result['least']:5.2f}  {result['first_ms']:8.1f}"
            f"  {result['median_ms']:9.2f}  {result['p95_ms']:7.2f}  {result['cpu_ms']:6.2f}"
        )
    return results


def measure(
    search: Search, queries: NDArray[numpy.float32], truth: NDArray[numpy.float32], k: int, where: str | None
) -> dict[str, float]:
    times, busy, found = [], [], []
    for query, nearest in zip(queries, truth, strict=True):
        started, cpu = time.perf_counter(), time.process_time()
        hits = search(query, k, where)
        times.append(1000 * (time.perf_counter() - started))
        busy.append(1000 * (time.process_time() - cpu))
        there = nearest[numpy.isfinite(nearest)]
        # an index that compares by rounded vectors gives similarities of its own: they are computed here
        found.append(sum(score >= there.min() - 1e-5 for score in hits_scores(hits, query)) / len(there))
    return {
        "recall": round(statistics.fmean(found), 4),
        "least": round(min(found), 2),
        "first_ms": round(times[0], 2),
        "first_cpu_ms": round(busy[0], 2),
        "median_ms": round(statistics.median(times[1:]), 2),
        "p95_ms": round(float(numpy.percentile(times[1:], 95)), 2),
        "cpu_ms": round(statistics.median(busy[1:]), 2),
    }


def hits_scores(hits: Sequence[Hit] | pa.Table, query: NDArray[numpy.float32]) -> list[float]:
    if not isinstance(hits, pa.Table):
        return [hit.score for hit in hits]
    vectors = hits["vector"].combine_chunks().flatten().to_numpy().reshape(len(hits), -1)
    return (vectors @ query).tolist()


def lancedb_defaults(place: Path) -> tuple[Search, dict[str, object]]:
    """A search by LanceDB's defaults of the collection in `place`, and what building its index took."""
    table = lancedb.connect(place).open_table(lance.TABLE)
    built: dict[str, object] = {}
    if not (place.with_name(f"{place.name}.built")).exists():
        started, busy = time.perf_counter(), time.process_time()
        table.create_index("vector", config=IvfPq(distance_type="cosine"), replace=True)
        built = {
            "index_s": round(time.perf_counter() - started, 1),
            "index_cpu_s": round(time.process_time() - busy, 1),
        }
        place.with_name(f"{place.name}.built").touch()

    def search(query: NDArray[numpy.float32], k: int, where: str | None) -> pa.Table:
        builder: Any = table.search(query, vector_column_name="vector")
        builder = builder.distance_type("cosine").limit(k)
        return (builder if where is None else builder.where(where)).to_arrow()

    return search, built


if __name__ == "__main__":
    main()
