"""The index of a large collection in a bucket, built by many machines: lance-ray (pip install 'mmwudao[ray]').

    python -m retrieval.collections.distributed s3://bucket/vectors --ray auto --workers 32

Run it on a Ray cluster (see `retrieval.cluster`); "local" is the cores of this machine. Searchers go on meanwhile, and
use the index as soon as it is there. Each worker indexes some of the table's fragments.
"""

from __future__ import annotations

import argparse

from retrieval.cluster import LOCAL, connected
from retrieval.collections.lance import TABLE, LanceCollection
from retrieval.collections.opening import open_collection

ROWS_A_PARTITION = 1_000_000  # of the graph, as LanceDB's own default


def build_index(place: str, workers: int, address: str = LOCAL) -> int:
    """Build the index of the collection at `place` anew, with up to so many workers at once. Returns how many items.

    Raises `CollectionError` when there is no collection, and `ValueError` without lance-ray or a cluster at `address`.
    """
    try:
        from lance_ray import create_index
    except ImportError as error:
        raise ValueError("an index is built by many machines with lance-ray: pip install 'mmwudao[ray]'") from error
    if workers < 1:
        raise ValueError(f"an index is built by at least one worker, not {workers}")
    with open_collection(place) as collection:
        if not isinstance(collection, LanceCollection):
            raise ValueError("a Milvus server builds its indexes itself")
        items = collection.count()
    with connected(address):
        create_index(
            f"{place.rstrip('/')}/{TABLE}.lance",
            column="vector",
            index_type="IVF_HNSW_SQ",
            name="vector_idx",
            metric="cosine",
            num_workers=workers,
            num_partitions=max(1, items // ROWS_A_PARTITION),
        )
    return items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection", help="a folder that all machines see, or s3://bucket/prefix")
    parser.add_argument("--ray", metavar="ADDRESS", default=LOCAL, help="auto, HOST:PORT, or local")
    parser.add_argument("--workers", type=int, default=4)
    arguments = parser.parse_args()
    print(f"{build_index(arguments.collection, arguments.workers, arguments.ray)} items")


if __name__ == "__main__":
    main()
