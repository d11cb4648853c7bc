"""Which way a search of a large collection goes, and that every way finds the same."""

from __future__ import annotations

import json

import numpy
import pyarrow as pa
import pytest

from retrieval.collections import lance_index, lance_search
from retrieval.collections.lance_search import MAX_CANDIDATES, PROBES, UNKNOWN_PROBES, choose_way, probes_for
from retrieval.collections.opening import Item, open_collection
from tests.helpers.collections import DIM, exact

MILLION = 1_000_000


@pytest.mark.parametrize(
    ("items", "allowed", "searches", "way"),
    [
        (5_000, 5, 3, ("filtered", 0)),  # there is no index that could be left out
        (MILLION, 0, 0, ("allowed", 0)),
        (MILLION, 1_000, 0, ("allowed", 0)),
        (MILLION, 10_000, 0, ("filtered", 0)),  # fetching them costs more than one search of the index
        (MILLION, 10_000, 1, ("allowed", 0)),  # and pays when the filter comes again
        (MILLION, 100_000, 5, ("nearest", 250)),
        (MILLION, MILLION, 5, ("nearest", 25)),
        (100 * MILLION, MILLION, 5, ("filtered", 0)),  # more than may be kept
    ],
)
def test_the_cheapest_way(items, allowed, searches, way):
    assert choose_way(items, allowed, 10, 512, searches) == way


def test_many_hits_are_not_looked_for_among_the_nearest():
    assert choose_way(MILLION, 100_000, 10, 512, 0).candidates <= MAX_CANDIDATES
    assert choose_way(MILLION, 100_000, 100, 512, 0).kind == "filtered"


def test_probes_are_those_of_the_smallest_size_that_suffices():
    def schema(metadata):
        return pa.schema([pa.field("vector", pa.list_(pa.float32(), 2), metadata=metadata)])

    measured = schema({PROBES: json.dumps({10: 4, 100: 8, 500: 16}).encode()})
    assert [probes_for(measured, candidates) for candidates in (20, 21, 200, 1_000, 9_000)] == [4, 8, 8, 16, 16]
    assert probes_for(schema(None), 20) == UNKNOWN_PROBES


@pytest.fixture
def clustered(tmp_path, monkeypatch):
    """1,200 items around 30 centres, of them 600 without an index; `rare` is 1 of 100, `common` 1 of 2."""
    monkeypatch.setattr(lance_search, "EXACT_UP_TO", 400)
    monkeypatch.setattr(lance_index, "ROWS_A_PARTITION", 50)
    rng = numpy.random.default_rng(0)
    centres = rng.standard_normal((30, DIM))
    vectors = centres[rng.integers(30, size=1200)] + 0.5 * rng.standard_normal((1200, DIM))
    items = [
        Item(
            f"i{k:04}",
            (vector / numpy.linalg.norm(vector)).astype(numpy.float32),
            {"rare": k % 100 == 0, "common": k % 2 == 0, "number": k},
        )
        for k, vector in enumerate(vectors)
    ]
    with open_collection(tmp_path / "c", create=True, dim=DIM) as collection:
        collection.add(items[:600])
        collection.optimise()
        collection.add(items[600:])
        yield collection, items


def agree(collection, items, where, allows, k=10):
    for query in (items[0].vector, items[7].vector, items[900].vector):
        wanted = exact([item for item in items if allows(item.metadata)], query, k)
        found = [hit.id for hit in collection.search(query, k, where)]
        assert len(found) == len(wanted)
        assert len(set(found) & set(wanted)) >= len(wanted) - 1, where


def test_every_way_finds_the_same(clustered, monkeypatch):
    collection, items = clustered
    assert json.loads(collection._table.schema.field("vector").metadata[PROBES]).keys() == {"10", "100", "500"}
    agree(collection, items, None, lambda _: True)
    for way in ("allowed", "nearest", "filtered"):
        monkeypatch.setattr(lance_search, "choose_way", lambda *_, way=way: lance_search.Way(way, 60))
        agree(collection, items, "rare = true", lambda m: m["rare"])
        agree(collection, items, "common = true", lambda m: m["common"])
        agree(collection, items, "number < 3", lambda m: m["number"] < 3)
        assert collection.search(items[0].vector, 10, "number < 0") == []


def test_what_a_filter_allowed_is_forgotten_when_the_collection_changes(clustered, monkeypatch):
    collection, items = clustered
    monkeypatch.setattr(lance_search, "choose_way", lambda *_: lance_search.Way("allowed"))
    for _ in range(2):
        agree(collection, items, "rare = true", lambda m: m["rare"])
    assert [allowed.found is not None for allowed in collection._searcher._filters.values()] == [True]
    best = collection.search(items[0].vector, 1, "rare = true")[0]
    assert best.id == "i0000"
    collection.delete(["i0000"])
    assert "i0000" not in {hit.id for hit in collection.search(items[0].vector, 12, "rare = true")}
    collection.add([Item("new", items[0].vector, {"rare": True, "common": True, "number": 1})])
    assert collection.search(items[0].vector, 1, "rare = true")[0].id == "new"
    collection.upsert([Item("new", -items[0].vector, {"rare": True, "common": True, "number": 1})])
    assert collection.search(items[0].vector, 1, "rare = true")[0].id != "new"
    # another process, or another handle, writes too
    with open_collection(collection.location) as other:
        other.add([Item("other", items[0].vector, {"rare": True})])
    assert collection.search(items[0].vector, 1, "rare = true")[0].id == "other"


def test_few_filters_are_kept_with_their_vectors(clustered, monkeypatch):
    collection, items = clustered
    monkeypatch.setattr(lance_search, "choose_way", lambda *_: lance_search.Way("allowed"))
    for number in range(lance_search.KEPT_FILTERS + 3):
        collection.search(items[0].vector, 10, f"number < {number + 1}")
    kept = [where for where, allowed in collection._searcher._filters.items() if allowed.found is not None]
    assert kept == [f"(`number` < {number + 1})" for number in range(3, lance_search.KEPT_FILTERS + 3)]
