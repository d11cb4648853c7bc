"""Builds the index of a large collection in a bucket on many machines, with lance-ray (pip install 'mmwudao[ray]').

    python -m retrieval.collections.distributed s3://bucket/vectors --ray auto --workers 32

Run it on a Ray cluster (see `retrieval.cluster`); "local" uses the cores of this machine. Searches go on in the
meantime, and use the index as soon as it is complete. Each worker indexes some of the table's fragments.
"""

from __future__ import annotations

import argparse

from retrieval.cluster import LOCAL, connected
from retrieval.collections.lance import TABLE, LanceCollection
from retrieval.collections.opening import open_collection

ROWS_A_PARTITION = 1_000_000  # of the graph, LanceDB's default


def build_index(location: str, workers: int, address: str = LOCAL) -> int:
    """Rebuild the index of the collection at `location` with up to `workers` workers. Returns the number of items.

    Raises `CollectionError` if there is no collection, and `ValueError` without lance-ray or a cluster at `address`.
    """
    try:
        from lance_ray import create_index
    except ImportError as error:
        raise ValueError("building an index on many machines needs lance-ray: pip install 'mmwudao[ray]'") from error
    if workers < 1:
        raise ValueError(f"building an index needs at least one worker, not {workers}")
    with open_collection(location) as collection:
        if not isinstance(collection, LanceCollection):
            raise ValueError("a Milvus server builds its indexes itself")
        items = collection.count()
    with connected(address):
        create_index(
            f"{location.rstrip('/')}/{TABLE}.lance",
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
    parser.add_argument("collection", help="A folder that all machines share, or s3://bucket/prefix.")
    parser.add_argument("--ray", metavar="ADDRESS", default=LOCAL, help="The Ray cluster: auto, HOST:PORT, or local.")
    parser.add_argument("--workers", type=int, default=4, help="How many workers build at the same time.")
    arguments = parser.parse_args()
    print(f"{build_index(arguments.collection, arguments.workers, arguments.ray)} items")


if __name__ == "__main__":
    main()
