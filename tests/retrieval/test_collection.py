"""The collection in a folder: what is stored is found, filters come before ranking, bad input is one line."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time

import numpy
import pytest
from filelock import FileLock

from retrieval.collections import lance as lance_collection
from retrieval.collections import lance_search
from retrieval.collections.distributed import build_index
from retrieval.collections.opening import CollectionError, Item, open_collection
from retrieval.collections.recall import measure_search_recall
from tests.helpers.collections import DIM, exact, make_items


@pytest.fixture
def collection(tmp_path):
    with open_collection(tmp_path / "c", create=True, dim=DIM, model="m" * 64) as opened:
        yield opened


def test_what_is_stored_is_found_again(collection, tmp_path):
    items = make_items(300)
    collection.add(items)
    assert collection.count() == 300
    for item, found in zip(items[5:7], collection.get(["item-00005", "nothing", "item-00006"]), strict=True):
        assert (found.id, found.metadata) == (item.id, item.metadata)
        numpy.testing.assert_allclose(found.vector, item.vector, atol=1e-6)
    query = numpy.random.default_rng(9).standard_normal(DIM) * 7  # of any length
    hits = collection.search(query, 5)
    assert [hit.id for hit in hits] == exact(items, query, 5)
    assert hits[0].score == pytest.approx(float(items[int(hits[0].id[-5:])].vector @ query / numpy.linalg.norm(query)))
    assert hits[0].metadata == items[int(hits[0].id[-5:])].metadata
    # another process, or object, sees it at once, and what is written there is seen here
    with open_collection(tmp_path / "c") as other:
        assert (other.dim, other.model, other.count()) == (DIM, "m" * 64, 300)
        assert other.delete(["item-00000", "nothing", "item-00001", "item-00000"]) == 2
    assert collection.count() == 298


def test_filters_come_before_ranking(collection):
    items = make_items(300)
    collection.add(items)
    query = numpy.ones(DIM)
    for where, allowed in (
        ("family = 'noto'", [item for item in items if item.metadata["family"] == "noto"]),
        ("number >= 290 AND NOT even = true", [item for item in items[290:] if item.metadata["number"] % 2]),
        ("half IN (1, 1.5) OR id = 'item-00009'", [items[2], items[3], items[9]]),
        ("number < 0", []),
    ):
        assert [hit.id for hit in collection.search(query, 10, where)] == exact(allowed, query, 10) if allowed else True
        assert collection.count(where) == len(allowed)
        assert sum(len(ids) for ids, _ in collection.scan(where)) == len(allowed)
    assert collection.search(query, 10, "number < 0") == []


def test_add_is_all_or_nothing_and_upsert_replaces(collection):
    collection.add(make_items(10))
    with pytest.raises(CollectionError, match="2 ids are stored already: item-00008, item-00009"):
        collection.add(make_items(4, seed=1, start=8))
    assert collection.count() == 10
    changed = make_items(4, seed=1, start=8)
    collection.upsert([*changed[:3], Item("item-00011", changed[3].vector * 5, {"colour": "red"})])
    assert collection.count() == 12
    found = {item.id: item for item in collection.get([item.id for item in changed])}
    numpy.testing.assert_allclose(found["item-00008"].vector, changed[0].vector, atol=1e-6)
    assert numpy.linalg.norm(found["item-00011"].vector) == pytest.approx(1, abs=1e-6)
    assert found["item-00011"].metadata == {"colour": "red"}
    assert collection.count("colour = 'red'") == 1
    # an item without the column fails the comparison and its opposite
    assert collection.count("colour != 'red'") == collection.count("NOT colour = 'red'") == 0


def test_a_column_of_integers_takes_fractions_later(collection):
    vector = numpy.ones(DIM)
    collection.add([Item("a", vector, {"since": 2016}), Item("b", vector, {"other": 1})])
    collection.optimise()
    collection.add([Item("c", vector, {"since": 2016.5})])
    stored = [item.metadata for item in collection.get(["a", "b", "c"])]
    assert stored == [{"since": 2016}, {"other": 1}, {"since": 2016.5}]
    counts = {where: collection.count(f"since {where}") for where in ("> 2016", "= 2016", "<= 2016.5", "!= 2016.5")}
    assert counts == {"> 2016": 1, "= 2016": 1, "<= 2016.5": 2, "!= 2016.5": 1}


def test_a_widening_that_was_killed_is_finished(collection):
    from retrieval.collections.lance_columns import WIDE

    vector = numpy.ones(DIM)
    collection.add([Item("a", vector, {"first": 1, "second": 2})])
    table = collection._table
    table.add_columns({f"{name}{WIDE}": f"cast(`{name}` as double)" for name in ("first", "second")})
    table.drop_columns(["second"])
    collection.add([Item("b", vector, {"first": 1.5, "second": 2.5})])
    stored = [item.metadata for item in collection.get(["a", "b"])]
    assert stored == [{"first": 1.0, "second": 2.0}, {"first": 1.5, "second": 2.5}]


def test_columns_keep_their_types(collection):
    vector = numpy.ones(DIM)
    collection.add(
        [Item("a", vector, {"size": 1}), Item("b", vector, {"size": 2.5}), Item("c", vector, {"year": 2016})]
    )
    collection.add([Item("d", vector, {"size": 3})])
    assert [item.metadata for item in collection.get(["a", "d", "c"])] == [{"size": 1.0}, {"size": 3.0}, {"year": 2016}]
    for metadata, problem in (
        ({"year": True}, "year is an integer"),
        ({"size": "big"}, "size is a number here"),
        ({"size": float("nan")}, "a metadata value is text, a number, true or false"),
        ({"year": 2**63}, "year = "),
        ({"tags": ["a"]}, "not tags ="),
        ({"tags": None}, "not tags ="),
        ({"tag": "\ud800"}, "not tag ="),
        ({"vector": 1}, "a metadata name"),
        ({"_distance": 1}, "a metadata name"),
        ({"a b": 1}, "a metadata name"),
        ({"In": 1}, "a metadata name"),
    ):
        with pytest.raises(CollectionError, match=problem) as caught:
            collection.add([Item("e", vector, metadata)])  # type: ignore[arg-type]  # that is the point
        assert "\n" not in str(caught.value)
    assert collection.count() == 4


def test_names_of_any_script_and_with_quotes(collection):
    names = ["it's", '"', "猫/1", "a\nb", "\\", "x" * 512, "`", "%_", "\u00e9", "e\u0301"]
    vectors = numpy.random.default_rng(0).standard_normal((len(names), DIM))
    collection.add([Item(name, vector, {"name": name}) for name, vector in zip(names, vectors, strict=True)])
    assert [item.id for item in collection.get(names)] == names
    for name, vector in zip(names, vectors, strict=True):
        quoted = name.replace("'", "''")
        assert [hit.id for hit in collection.search(vector, 3, f"name = '{quoted}'")] == [name]
    assert collection.delete(names) == len(names)
    assert collection.count() == 0


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda c: c.search(numpy.ones(3)), r"the query: its vector has the shape \[3\], not \[16\]"),
        (lambda c: c.search(numpy.zeros(DIM)), "zero, or not finite"),
        (lambda c: c.search(numpy.full(DIM, numpy.nan)), "zero, or not finite"),
        (lambda c: c.search(["x"] * DIM), "does not consist of numbers"),
        (lambda c: c.search(numpy.ones(DIM), 0), "returns 1 to 10000 items, not 0"),
        (lambda c: c.search(numpy.ones(DIM), where="colour = 1"), "no column 'colour'"),
        (lambda c: c.count("vector = 1"), "no column 'vector'"),
        (lambda c: c.add([Item("a", numpy.ones(DIM + 1))]), "a: its vector has the shape"),
        (lambda c: c.add([Item("a", numpy.ones(DIM))] * 2), "given twice: a"),
        (lambda c: c.upsert([Item("a", numpy.ones(DIM))] * 2), "given twice: a"),
        (lambda c: c.upsert([Item("", numpy.ones(DIM))]), "an id is a text of 1 to 512"),
        (lambda c: c.upsert([Item("x" * 513, numpy.ones(DIM))]), "an id is a text of 1 to 512"),
        (lambda c: c.get("abc"), "not one text"),
        (lambda c: c.delete([3]), "an id is a text"),
        (lambda c: c.snapshot("../a"), "a snapshot's name"),
        (lambda c: c.restore("none"), "no snapshot 'none'; there are: none"),
    ],
)
def test_bad_calls_are_one_line(collection, call, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        call(collection)
    assert "\n" not in str(caught.value)
    assert collection.count() == 0


def test_an_empty_collection_answers(collection):
    assert collection.search(numpy.ones(DIM)) == []
    assert (collection.get(["a"]), collection.delete(["a"]), collection.count()) == ([], 0, 0)
    collection.add([])
    collection.upsert([])
    collection.optimise()
    assert collection.snapshots() == []


def test_places_that_are_refused(tmp_path):
    with pytest.raises(CollectionError, match="no collection at"):
        open_collection(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(CollectionError, match="needs the dimension"):
        open_collection(tmp_path / "c", create=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(CollectionError, match="holds other files"):
        open_collection(tmp_path / "full", create=True, dim=DIM)
    open_collection(tmp_path / "c", create=True, dim=DIM, model="a").close()
    with pytest.raises(CollectionError, match="dimension 16, not 4"):
        open_collection(tmp_path / "c", dim=4)
    with pytest.raises(CollectionError, match=r"other towers \(a, not b\)"):
        open_collection(tmp_path / "c", create=True, dim=DIM, model="b")
    with pytest.raises(CollectionError, match="durable is for folders"):
        open_collection("s3://bucket/c", durable=True)


def test_snapshots_survive_changes_and_optimise(collection, monkeypatch):
    monkeypatch.setattr(lance_collection, "KEEP", lance_collection.timedelta(0))
    items = make_items(50)
    collection.add(items)
    collection.snapshot("before")
    with pytest.raises(CollectionError, match="the snapshot .before. exists already"):
        collection.snapshot("before")
    collection.delete([item.id for item in items[:40]])
    collection.upsert([Item("new", numpy.ones(DIM), {"colour": "red"})])
    collection.optimise()
    collection.snapshot("after")
    for _ in range(2):  # restored snapshots stay
        collection.restore("before")
        assert collection.count() == 50
        assert collection.search(items[3].vector, 1)[0].id == items[3].id
        collection.optimise()
        collection.restore("after")
        assert (collection.count(), collection.count("colour = 'red'")) == (11, 1)
    assert collection.snapshots() == ["after", "before"]


def test_an_index_is_built_past_a_size_and_found_good(collection, monkeypatch):
    monkeypatch.setattr(lance_search, "EXACT_UP_TO", 500)
    items = make_items(400)
    collection.add(items)
    collection.optimise()
    assert not list(collection._table.list_indices())
    more = make_items(600, seed=1, start=400)
    collection.add(more)
    collection.optimise()
    assert {tuple(index.columns) for index in collection._table.list_indices()} >= {("vector",), ("id",), ("family",)}
    assert measure_search_recall(collection, queries=50).recall >= 0.95
    assert measure_search_recall(collection, queries=20, where="family = 'noto'").recall >= 0.95
    # what comes later is found before and after it is indexed; when it is the larger part, the index is made anew
    collection.add(make_items(1500, seed=2, start=1000))
    assert measure_search_recall(collection, queries=20).recall >= 0.95
    collection.delete([item.id for item in items[:100]])
    collection.optimise()
    index = next(index for index in collection._table.list_indices() if index.columns == ["vector"])
    assert (index.num_indexed_rows, index.num_unindexed_rows, index.num_segments) == (2400, 0, 1)
    assert measure_search_recall(collection, queries=50).recall >= 0.95
    assert collection.get(["item-00000"]) == []


def test_an_index_by_many_machines_needs_lance_ray(collection, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lance_ray", None)
    with pytest.raises(ValueError, match=r"pip install 'mmwudao\[ray\]'"):
        build_index(str(tmp_path / "c"), 2)


@pytest.mark.slow
def test_an_index_by_many_machines(collection, tmp_path):
    pytest.importorskip("lance_ray")
    for start in (0, 600):  # the second time, there is an index that does not know the newest items
        for more in (start, start + 300):
            collection.add(make_items(300, seed=more, start=more))
        assert build_index(str(tmp_path / "c"), 2) == start + 600
        (index,) = collection._table.list_indices()
        assert index.columns == ["vector"]
        assert collection._table.index_stats(index.name).num_unindexed_rows == 0
        assert measure_search_recall(collection, queries=20).recall >= 0.95


def test_threads_write_and_search_at_once(collection):
    collection.add(make_items(20))
    problems = []

    def work(start):
        try:
            for k in range(3):
                collection.upsert(make_items(5, seed=start, start=start + 5 * k))
                collection.search(numpy.ones(DIM), 3, "even = true")
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(100 * (k + 1),)) for k in range(4)]
    for thread in threads:
        thread.start()
    collection.optimise()
    for thread in threads:
        thread.join()
    assert problems == []
    assert collection.count() == 20 + 4 * 15


def write_batches(place, start):
    with open_collection(place) as collection:
        for k in range(4):
            collection.upsert(make_items(5, start=start + 5 * k))


def test_processes_write_at_once_and_die_without_leaving_a_lock(tmp_path):
    open_collection(tmp_path / "c", create=True, dim=DIM).close()
    context = multiprocessing.get_context("spawn")  # LanceDB's threads do not survive a fork
    children = [context.Process(target=write_batches, args=(tmp_path / "c", 100 * k)) for k in range(2)]
    holder = context.Process(target=hold_lock, args=(tmp_path / "c",))
    for child in [*children, holder]:
        child.start()
    while not (tmp_path / "held").exists() and holder.is_alive():
        time.sleep(0.01)
    holder.kill()
    for child in [*children, holder]:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    with open_collection(tmp_path / "c") as collection:
        assert collection.count() == 40
        assert {name for ids, _ in collection.scan() for name in ids} == {
            f"item-{k:05}" for start in (0, 100) for k in range(start, start + 20)
        }


def hold_lock(place):
    with FileLock(place / ".write.lock"):  # as a writer does
        (place.parent / "held").touch()
        time.sleep(600)


def test_durable_synchronises_every_file_before_it_answers(tmp_path, monkeypatch):
    paths = {}
    monkeypatch.setattr(
        lance_collection.os,
        "fsync",
        lambda number: paths.update({lance_collection.os.readlink(f"/proc/self/fd/{number}"): True}),
    )
    with open_collection(tmp_path / "c", create=True, dim=DIM, durable=True) as collection:
        for change in (
            lambda: collection.add(make_items(5)),
            lambda: collection.delete(["item-00001"]),
            lambda: collection.snapshot("a"),
            lambda: collection.restore("a"),
            lambda: collection.optimise(),
        ):
            before = set((tmp_path / "c").rglob("*"))
            paths.clear()
            change()
            fresh = {path for path in set((tmp_path / "c").rglob("*")) - before if path.is_file()}
            assert fresh <= {*map(type(tmp_path), paths)} | {tmp_path / "c" / ".optimise.lock"}
            assert {str(path.parent) for path in fresh} <= set(paths)
    paths.clear()
    with open_collection(tmp_path / "c") as collection:
        collection.delete(["item-00002"])
    assert paths == {}
