"""Does a collection keep what it acknowledged when its processes are killed? `--kills` times kill -9 at random moments.

    python -m bench.load.collection_kills [--kills 20] [--items 100000] [--dim 64] [--batch 2000] [--durable]

A writer adds, replaces and deletes batches, and notes each in a journal (with fsync) before it starts and after it was
acknowledged; beside it another process optimises over and over. Both are killed together at a random moment. Then the
collection is compared with the journal: every acknowledged change must be there, nothing twice, and the one change
under way must be there whole or not at all. The table has a line for each kill.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import Any, TextIO

import numpy
import pyarrow as pa
from numpy.typing import NDArray

from retrieval.collections import lance_search
from retrieval.collections.opening import Collection, open_collection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--items", type=int, default=100_000, help="that are added at most")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2_000, help="rows of a change; up to 5,000")
    parser.add_argument("--longest", type=float, default=3.0, help="seconds from the first change to a kill")
    parser.add_argument("--index-from", type=int, default=5_000, help="items past which optimising builds an index")
    parser.add_argument("--durable", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")  # LanceDB's threads do not survive a fork
    draw = random.Random(arguments.seed)
    totals: Counter[str] = Counter()
    print("kill  after s  acknowledged  under way  items  missing  doubled  wrong  optimised")
    with tempfile.TemporaryDirectory() as folder:
        place, journal, rounds = Path(folder) / "c", Path(folder) / "journal", Path(folder) / "rounds"
        open_collection(place, create=True, dim=arguments.dim).close()
        journal.touch()
        rounds.touch()
        for kill in range(arguments.kills):
            before, optimised = journal.stat().st_size, rounds.stat().st_size
            children = [
                context.Process(target=write, args=(place, journal, arguments, kill)),
                context.Process(target=optimise, args=(place, rounds, arguments)),
            ]
            for child in children:
                child.start()
            starting = [(journal, before, children[0]), (rounds, optimised, children[1])]
            while any(path.stat().st_size == size and child.is_alive() for path, size, child in starting):
                time.sleep(0.01)
            delay = draw.uniform(0, arguments.longest)
            children[0].join(delay)
            if children[0].exitcode not in (None, 0) or children[1].exitcode is not None:
                raise SystemExit(f"a child ended by itself: {[child.exitcode for child in children]}")
            for child in children:
                child.kill()
            for child in children:
                child.join()
            with open_collection(place) as collection:
                report = compare(collection, journal, arguments.batch)
            report["optimised"] = rounds.stat().st_size - optimised - 1
            totals.update({name: int(report[name]) for name in ("missing", "doubled", "wrong", "optimised")})
            print(
                f"{kill + 1:4}  {delay:7.2f}  {report['acknowledged']:12}  {report['under_way']:9}  {report['items']:5}"
                f"  {report['missing']:7}  {report['doubled']:7}  {report['wrong']:5}  {report['optimised']:9}",
                flush=True,
            )
        changes = report["acknowledged"]
    record = {"kills": arguments.kills, "acknowledged_changes": changes, "rows_a_change": arguments.batch, **totals}
    print(json.dumps(record | {"dim": arguments.dim, "durable": arguments.durable}))
    if totals["missing"] or totals["doubled"] or totals["wrong"]:
        raise SystemExit("acknowledged changes were lost")


def write(place: Path, journal: Path, arguments: argparse.Namespace, seed: int) -> None:
    """Change the collection batch by batch until killed; begin with what the journal says is there."""
    draw = random.Random(1000 * arguments.seed + seed)
    entries = read(journal)
    batches, _ = replay(entries)
    batch, version = (max([entry[name] for entry in entries], default=0) for name in ("batch", "version"))
    with open_collection(place, durable=arguments.durable) as collection, journal.open("a") as log:
        while True:
            version += 1
            kind = draw.choice(["add", "add", "upsert", "delete"]) if batches else "add"
            if kind == "add" and (batch + 1) * arguments.batch > arguments.items:
                kind = "upsert"
            batch += kind == "add"
            chosen = batch if kind == "add" else draw.choice(sorted(batches or [1]))
            change = {"kind": kind, "batch": chosen, "version": version}
            note(log, {"step": "start", **change})
            ids = [f"{chosen}-{k}" for k in range(arguments.batch)]
            if kind == "delete":
                collection.delete(ids)
            else:
                columns = {"id": ids, "batch": [chosen] * len(ids), "version": [version] * len(ids)}
                vectors = vectors_of(chosen, version, arguments.batch, arguments.dim)
                column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), arguments.dim)
                table = pa.table(columns | {"vector": column})
                (collection.add if kind == "add" else collection.upsert)(table)
            note(log, {"step": "done", **change})
            apply(batches, change)


def optimise(place: Path, rounds: Path, arguments: argparse.Namespace) -> None:
    """Optimise again and again, with an index also for few items."""
    lance_search.EXACT_UP_TO = arguments.index_from
    with open_collection(place, durable=arguments.durable) as collection, rounds.open("a", buffering=1) as log:
        while True:
            log.write("\n")  # one at the start, one a round
            collection.optimise()
            time.sleep(0.1)


def vectors_of(batch: int, version: int, rows: int, dim: int) -> NDArray[numpy.float32]:
    """The unit vectors [rows, dim] that a batch has in a version, to be told apart from every other."""
    vectors = numpy.random.default_rng([batch, version]).standard_normal((rows, dim), numpy.float32)
    return vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)


def note(log: TextIO, entry: dict[str, Any]) -> None:
    log.write(json.dumps(entry) + "\n")
    log.flush()
    os.fsync(log.fileno())


def read(journal: Path) -> list[dict[str, Any]]:
    """The journal's entries; a last line that a kill has cut off was not followed by anything."""
    lines = journal.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def replay(entries: list[dict[str, Any]]) -> tuple[dict[int, int], dict[str, Any] | None]:
    """What must be there (batch -> version), and the change under way, if any."""
    batches: dict[int, int] = {}
    for entry in entries:
        if entry["step"] == "done":
            apply(batches, entry)
    return batches, entries[-1] if entries and entries[-1]["step"] == "start" else None


def apply(batches: dict[int, int], change: dict[str, Any]) -> None:
    if change["kind"] == "delete":
        batches.pop(change["batch"], None)
    else:
        batches[change["batch"]] = change["version"]


def compare(collection: Collection, journal: Path, rows: int) -> dict[str, int | str]:
    """The collection against the journal, vectors included; then the journal says what became of the change under way.

    Counts of rows: `missing` were acknowledged and are not there, `doubled` are there twice, `wrong` are there and
    should not be, hold another version or another vector, or belong to a change that is there in part.
    """
    batches, change = replay(read(journal))
    ids: Counter[str] = Counter()
    stored: dict[int, Counter[int]] = {}  # batch -> version -> rows
    wrong = 0
    expected = cache(partial(vectors_of, rows=rows, dim=collection.dim))
    for names, vectors in collection.scan():
        ids.update(names)
        metadata = {item.id: item.metadata for item in collection.get(names)}
        for name, vector in zip(names, vectors, strict=True):
            batch, version = int(metadata[name]["batch"]), int(metadata[name]["version"])
            stored.setdefault(batch, Counter())[version] += 1
            there = expected(batch, version)[int(name.partition("-")[2])]
            wrong += not numpy.allclose(vector, there, atol=1e-5)
    after = dict(batches)
    if change:
        apply(after, change)
    missing, happened = 0, False
    for batch in {*batches, *after, *stored}:
        there = stored.get(batch, Counter())
        states = [Counter({versions[batch]: rows}) if batch in versions else Counter() for versions in (batches, after)]
        happened |= there == states[1] != states[0]
        if there not in states:
            kept = sum(there[version] for version in {version for state in states for version in state})
            missing += max(0, min(map(Counter.total, states)) - kept)
            wrong += there.total() - kept if kept < there.total() else kept % rows
    if change:
        with journal.open("a") as log:
            note(log, {**change, "step": "done" if happened else "void"})
    return {
        "acknowledged": sum(entry["step"] == "done" for entry in read(journal)) - happened,
        "under_way": change["kind"] if change else "nothing",
        "items": ids.total(),
        "missing": missing,
        "doubled": sum(count > 1 for count in ids.values()),
        "wrong": wrong,
    }


if __name__ == "__main__":
    main()
