"""Many items at once, as tables of Arrow; filters that allow few, many and far items; snapshots that are dropped."""

from __future__ import annotations

import numpy
import pyarrow as pa
import pytest

from retrieval.collections import lance as lance_collection
from retrieval.collections import lance_search
from retrieval.collections.opening import CollectionError, ExistingIdsError, Item, open_collection
from tests.helpers.collections import DIM, exact, make_items


@pytest.fixture
def collection(tmp_path):
    with open_collection(tmp_path / "c", create=True, dim=DIM) as opened:
        yield opened


def vector_column(vectors, kind=None):
    kind = kind or pa.list_(pa.float32(), DIM)
    return pa.array([row.astype(kind.value_type.to_pandas_dtype()) for row in vectors], kind)


def make_table(count, seed=0, start=0, **columns):
    vectors = numpy.random.default_rng(seed).standard_normal((count, DIM))
    ids = [f"item-{k:05}" for k in range(start, start + count)]
    return pa.table({"id": ids, "vector": vector_column(vectors), **columns})


def test_a_table_is_stored_as_its_items_would_be(tmp_path):
    items = make_items(40)
    columns = {name: [item.metadata[name] for item in items] for name in items[0].metadata}
    vectors = vector_column([3 * item.vector for item in items])
    table = pa.table({"half": columns.pop("half"), "vector": vectors, "id": [item.id for item in items], **columns})
    with (
        open_collection(tmp_path / "items", create=True, dim=DIM) as one_by_one,
        open_collection(tmp_path / "table", create=True, dim=DIM) as at_once,
    ):
        one_by_one.add(items)
        at_once.add(pa.concat_tables([table.slice(0, 7), table.slice(7)]))  # in two chunks, one that starts inside
        ids = [item.id for item in items]
        for single, row in zip(one_by_one.get(ids), at_once.get(ids), strict=True):
            assert (single.id, single.metadata) == (row.id, row.metadata)
            numpy.testing.assert_allclose(single.vector, row.vector, atol=1e-6)
        query = numpy.ones(DIM)
        assert [hit.id for hit in at_once.search(query, 5, "even = true")] == exact(items[::2], query, 5)


@pytest.mark.parametrize("kind", [pa.list_(pa.float16(), DIM), pa.list_(pa.float64()), pa.large_list(pa.float32())])
def test_vectors_and_metadata_of_other_widths(collection, kind):
    vectors = numpy.random.default_rng(0).standard_normal((3, DIM))
    columns = {
        "id": pa.array(["a", "b", "c"], pa.large_string()),
        "vector": vector_column(vectors, kind),
        "family": pa.array(["noto", None, "noto"]).dictionary_encode(),
        "year": pa.array([2016, None, 2017], pa.uint16()),
        "size": pa.array([0.5, 1, None], pa.float32()),
        "nothing": pa.nulls(3),
        "empty": pa.array([None] * 3, pa.string()),
    }
    collection.add(pa.table(columns))
    found = collection.get(["a", "b", "c"])
    tolerance = 2e-3 if kind.value_type == pa.float16() else 1e-6
    numpy.testing.assert_allclose(found[0].vector, vectors[0] / numpy.linalg.norm(vectors[0]), atol=tolerance)
    assert [item.metadata for item in found] == [
        {"family": "noto", "year": 2016, "size": 0.5}, {"size": 1.0}, {"family": "noto", "year": 2017}
    ]  # fmt: skip
    with pytest.raises(CollectionError, match="no column 'empty'"):
        collection.count("empty = 'x'")
    # integers fit into a column of numbers, and items that come one by one into the columns of a table
    collection.add(make_table(1, size=pa.array([7], pa.int8())))
    collection.add([Item("d", vectors[0], {"size": 2**60, "year": 1})])
    assert [item.metadata for item in collection.get(["item-00000", "d"])] == [
        {"size": 7.0}, {"size": float(2**60), "year": 1}
    ]  # fmt: skip


def replaced(table, name, column):
    return table.set_column(table.schema.get_field_index(name), name, column)


BAD = make_table(3, number=[1, 2, 3])
ONES = numpy.ones((3, DIM))


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (BAD.drop_columns("vector"), "one column each for id, vector and metadata, not id, number"),
        (BAD.append_column("number", BAD["number"]), "one column each"),
        (replaced(BAD, "id", pa.array([1, 2, 3])), "the column id holds int64"),
        (replaced(BAD, "id", pa.array(["a", "", "b"])), "an id is a text of 1 to 512 characters, none of them NUL"),
        (replaced(BAD, "id", pa.array(["a", None, "b"])), "an id is a text of 1 to 512 characters, none of them NUL"),
        (replaced(BAD, "id", pa.array(["a", "x" * 513, "b"])), "an id is a text of 1 to 512"),
        (replaced(BAD, "id", pa.array(["a", "b\0", "c"])), "an id is a text of 1 to 512"),
        (replaced(BAD, "id", pa.array(["a", "b", "a"])), "ids that are given twice: a"),
        (replaced(BAD, "vector", pa.array([1.0, 2.0, 3.0])), "the column vector holds double"),
        (replaced(BAD, "vector", pa.array([[1] * DIM] * 3)), "vectors are lists of float16, float32 or float64"),
        (replaced(BAD, "vector", pa.array([[1.0] * (DIM - 1)] * 3)), "item-00000: its vector does not have 16 numbers"),
        (replaced(BAD, "vector", pa.array([[1.0] * DIM, None, [1.0] * DIM])), "item-00001: its vector does not have"),
        (replaced(BAD, "vector", vector_column(ONES * [[1], [1], [0]])), "item-00002: its vector is zero"),
        (replaced(BAD, "vector", vector_column(ONES * [[1], [numpy.nan], [1]])), "item-00001: .* not finite"),
        (replaced(BAD, "vector", vector_column(ONES * 1e300, pa.list_(pa.float64()))), "item-00000: .* not finite"),
        (replaced(BAD, "vector", pa.array([[1.0] * (DIM - 1) + [None]] * 3)), "item-00000: .* not finite"),
        (replaced(BAD, "number", pa.array(["1", "2", "3"])), "number is an integer here, and text in the table"),
        (replaced(BAD, "number", pa.array([1, 2, 2**63], pa.uint64())), "number: Integer value 9223372036854775808"),
        (BAD.append_column("half", pa.array([0.5, numpy.inf, None])), "item-00001: half is inf"),
        (BAD.append_column("tags", pa.array([["a"], [], []])), "tags holds list<item: string>: metadata is text"),
        (BAD.append_column("day", pa.array([1, 2, 3], pa.date32())), "day holds date32"),
        (BAD.append_column("a b", BAD["number"]), "a metadata name"),
        (BAD.append_column("In", BAD["number"]), "a metadata name"),
    ],
)
def test_bad_tables_are_one_line_and_store_nothing(collection, table, problem):
    collection.add([Item("there", numpy.ones(DIM), {"number": 1})])
    for store in (collection.add, collection.upsert):
        with pytest.raises(CollectionError, match=problem) as caught:
            store(table)
        assert "\n" not in str(caught.value)
    assert collection.count() == 1
    assert set(collection.get(["there"])[0].metadata) == {"number"}


def test_no_id_is_stored_twice(collection, monkeypatch):
    monkeypatch.setattr(lance_collection, "IDS_AT_ONCE", 10)
    for rows_an_id in (0, 1000):  # ids are read one after the other, or looked up in parts
        monkeypatch.setattr(lance_collection, "ROWS_AN_ID", rows_an_id)
        start = collection.count()
        collection.add(make_table(100, start=start))
        with pytest.raises(ExistingIdsError, match=f"30 ids are stored already: item-{start + 70:05}, item-"):
            collection.add(make_table(50, seed=1, start=start + 70))
        assert collection.count() == start + 100
        collection.upsert(make_table(50, seed=1, start=start + 70, colour=["red"] * 50))
        assert (collection.count(), collection.count("colour = 'red'")) == (start + 120, (start + 120) // 120 * 50)
        collection.delete([f"item-{start:05}"])
        collection.add(make_table(1, start=start))  # what was deleted is not there
    names = [name for ids, _ in collection.scan() for name in ids]
    assert len(names) == len(set(names)) == 240


def test_filters_of_every_width_are_exact_enough(collection, monkeypatch):
    monkeypatch.setattr(lance_search, "EXACT_UP_TO", 500)
    number = numpy.arange(2000)
    table = make_table(2000, number=number, many=number % 2 == 0)
    collection.add(table)
    collection.optimise()
    collection.add(make_table(100, seed=1, start=2000, number=number[:100] + 2000, many=number[:100] % 2 == 0))
    # what lies on the other side of the sphere is allowed, and not among the nearest of all
    query = numpy.ones(DIM)
    vectors = numpy.stack(table["vector"].to_pylist())
    far = numpy.argsort(vectors @ query / numpy.linalg.norm(vectors, axis=1))[:600]
    collection.upsert(table.take(far).append_column("far", pa.array([True] * 600)))
    ids = [name for names, _ in collection.scan() for name in names]
    items = collection.get(ids)
    for fetch_cost in (0, 2, 400):
        monkeypatch.setattr(lance_search, "FETCH_COST", fetch_cost)
        for where, allowed in (
            ("number < 15", [item for item in items if item.metadata["number"] < 15]),
            ("number >= 1500", [item for item in items if item.metadata["number"] >= 1500]),
            ("many = true", [item for item in items if item.metadata["many"]]),
            ("far = true", [item for item in items if item.metadata.get("far")]),
        ):
            for towards in (query, *vectors[:4]):
                found = [hit.id for hit in collection.search(towards, 10, where)]
                assert len(set(found) & set(exact(allowed, towards, 10))) >= 9, (fetch_cost, where)
        assert len(collection.search(query, 100, "number < 15")) == 15
        assert collection.search(query, 10, "number < 0") == []


def test_a_snapshot_is_dropped(collection, monkeypatch):
    monkeypatch.setattr(lance_collection, "KEEP", lance_collection.timedelta(0))
    collection.add(make_table(20))
    collection.snapshot("a")
    collection.delete(["item-00000"])
    collection.snapshot("b")
    collection.drop_snapshot("a")
    assert collection.snapshots() == ["b"]
    for call in (collection.drop_snapshot, collection.restore):
        with pytest.raises(CollectionError, match="no snapshot 'a'; there are: b"):
            call("a")
    collection.drop_snapshot("b")
    collection.optimise()
    assert (collection.count(), collection.snapshots()) == (19, [])
    assert len(collection._table.list_versions()) == 1  # nothing holds an old one any more
    collection.snapshot("a")
