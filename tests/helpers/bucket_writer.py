"""One of several writers of a collection in a bucket: prints what was acknowledged, as JSON.

python -m tests.helpers.bucket_writer s3://bucket/prefix NAME ROUNDS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import numpy

from retrieval.collections.base import Value
from retrieval.collections.opening import CollectionError, Item, open_collection
from tests.helpers.collections import DIM


def main() -> None:
    place, name, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    told: dict[str, list[str]] = {"own": [], "contested": [], "upserted": [], "deleted": [], "refused": []}
    vector = numpy.ones(DIM, numpy.float32)
    with open_collection(place, create=True, dim=DIM, model="m") as collection:
        print("ready", flush=True)
        sys.stdin.readline()
        for k in range(rounds):
            mine: dict[str, Value] = {"writer": name, f"of_{name}": k}
            steps: dict[str, tuple[Callable[[list[Item]], object], str, dict[str, Value]]] = {
                "own": (collection.add, f"{name}-{k}", mine),
                "contested": (collection.add, f"both-{k}", {"writer": name}),
                "upserted": (collection.upsert, "common", {"writer": name, "round": k}),
            }
            for kind, (write, one, metadata) in steps.items():
                try:
                    write([Item(one, vector, metadata)])
                except CollectionError as error:
                    told["refused"].append(f"{one}: {error}")
                else:
                    told[kind].append(one)
            if collection.delete([f"old-{name}-{k}"]) == 1:
                told["deleted"].append(f"old-{name}-{k}")
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
