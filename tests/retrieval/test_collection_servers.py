"""The same collection in a bucket (moto's S3 server) and on a Milvus server (milvus-lite), processes of their own."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest

from retrieval.collections.opening import CollectionError, Item, open_collection
from retrieval.collections.recall import measure_search_recall
from tests.helpers.collections import DIM, exact, make_items


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(command, port):
    """The process, when it answers on its port."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process
        except OSError:
            time.sleep(0.1)
    process.kill()
    pytest.fail(f"{command[0]} did not start")


@pytest.fixture(scope="module")
def s3_server():
    pytest.importorskip("moto")
    port = free_port()
    process = start([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.fixture
def bucket(s3_server, tmp_path, monkeypatch):
    import boto3

    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**credentials, "AWS_ENDPOINT": s3_server, "AWS_ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(name, value)
    name = f"test-{time.time_ns()}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=name)
    return f"s3://{name}/vectors"


@pytest.fixture(scope="module")
def milvus(tmp_path_factory):
    program = shutil.which("milvus-lite") or shutil.which("milvus-lite", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("milvus-lite is not installed")
    port = free_port()
    folder = tmp_path_factory.mktemp("milvus")
    process = start([program, "server", "--data-dir", str(folder), "--host", "127.0.0.1", "--port", str(port)], port)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


def exercise(place):
    """What every kind of collection can do; it is left open."""
    with pytest.raises(CollectionError, match="no collection at"):
        open_collection(place)
    items = make_items(200)
    collection = open_collection(place, create=True, dim=DIM, model="m" * 64)
    collection.add(items)
    with pytest.raises(CollectionError, match="1 ids are stored already: item-00199"):
        collection.add(make_items(2, start=199))
    query = numpy.random.default_rng(9).standard_normal(DIM)
    with open_collection(place, dim=DIM, model="m" * 64) as searcher:  # a second one, of another process as it were
        assert (searcher.dim, searcher.model, searcher.count()) == (DIM, "m" * 64, 200)
        assert [hit.id for hit in searcher.search(query, 5)] == exact(items, query, 5)
        noto = [item for item in items if item.metadata["family"] == "noto"]
        hits = searcher.search(query, 5, "family = 'noto'")
        assert [hit.id for hit in hits] == exact(noto, query, 5)
        assert hits[0].metadata == {item.id: item for item in items}[hits[0].id].metadata
        assert searcher.count("family = 'noto' AND NOT (number < 100 OR half IN (50, 75))") == 8
        assert collection.delete(["item-00003", "nothing"]) == 1
        collection.upsert([Item('it\'s "猫" \\', items[5].vector * 3, {"colour": "a'b\"c\\"}), items[7]])
        assert searcher.count() == 200
        found = searcher.search(items[5].vector, 2, "colour = 'a''b\"c\\'")
        assert [(hit.id, hit.metadata) for hit in found] == [('it\'s "猫" \\', {"colour": "a'b\"c\\"})]
        assert found[0].score == pytest.approx(1, abs=1e-5)
        assert searcher.count("colour != 'x'") == searcher.count("NOT colour = 'x'") == 1
        assert [item.id for item in searcher.get(["item-00007", "item-00003", "item-00001"])] == [
            "item-00007", "item-00001"
        ]  # fmt: skip
    collection.optimise()
    assert measure_search_recall(collection, queries=10).recall == 1
    for call, problem in (
        (lambda: collection.count("nothing = 1"), "no column 'nothing'"),
        (lambda: collection.upsert([Item("a", numpy.ones(DIM), {"number": "x"})]), "number is an integer here"),
        (lambda: open_collection(place, dim=3), "dimension 16, not 3"),
        (lambda: open_collection(place, model="n"), "other towers"),
        (lambda: open_collection(place, durable=True), "durable is for folders"),
    ):
        with pytest.raises(ValueError, match=problem) as caught:
            call()
        assert "\n" not in str(caught.value)
    return collection


def test_a_bucket(bucket):
    with exercise(bucket) as collection:
        collection.snapshot("before")
        collection.delete([f"item-{k:05}" for k in range(100)])
        collection.restore("before")
        assert collection.count() == 200
        assert collection.snapshots() == ["before"]


def test_two_writers_of_a_bucket_lose_nothing(bucket):
    """Each id that was acknowledged is there once, and of an id that both add, one writer is told that it lost."""
    rounds, names = 4, ("a", "b")
    with open_collection(bucket, create=True, dim=DIM, model="m") as collection:
        old = [f"old-{name}-{k}" for name in names for k in range(rounds)]
        collection.add([Item(one, numpy.ones(DIM), {}) for one in old])
    command = [sys.executable, "-m", "tests.helpers.bucket_writer", bucket]
    writers = [
        subprocess.Popen([*command, name, str(rounds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in names
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    told = [json.loads(writer.communicate()[0]) for writer in writers]
    acknowledged = [one for each in told for kind in ("own", "contested") for one in each[kind]]
    assert len(acknowledged) == len(set(acknowledged)), "an id was acknowledged to both"
    with open_collection(bucket) as collection:
        ids = [one for batch in collection.ids() for one in batch]
        assert len(ids) == len(set(ids))
        assert set(ids) == {*acknowledged, "common"}
        for name, each in zip(names, told, strict=True):
            assert len(each["own"]) == len(each["deleted"]) == len(each["upserted"]) == rounds
            assert {item.metadata["writer"] for item in collection.get(each["contested"])} <= {name}
    assert sum(len(each["contested"]) for each in told) == rounds
    assert all("\n" not in line for each in told for line in each["refused"])


def test_a_milvus_server(milvus):
    with exercise(f"{milvus}/pictures") as collection:
        assert collection.snapshots() == []
        with pytest.raises(CollectionError, match="Milvus Backup"):
            collection.snapshot("before")


def test_places_that_do_not_answer(milvus):
    for place, problem in (
        (f"{milvus}/", "give http://host:port/name"),
        (f"{milvus}/a-b", "give http://host:port/name"),
        ("http://user:secret@:19530/a", "give http://host:port/name"),
        (f"http://user:secret@127.0.0.1:{free_port()}/a", "no Milvus server answers"),
    ):
        with pytest.raises(CollectionError, match=problem) as caught:
            open_collection(place)
        assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_kills_lose_nothing():
    script = Path(__file__).parents[2] / "bench" / "load" / "collection_kills.py"
    options = ["--kills", "5", "--items", "4000", "--batch", "200", "--dim", "16", "--index-from", "300"]
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=True)
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["missing"], record["doubled"], record["wrong"]) == (0, 0, 0)
    assert record["acknowledged_changes"] >= 5
