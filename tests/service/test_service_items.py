"""The items and search routes, on a collection in memory."""

from __future__ import annotations

import pytest

from mmwudao.service.queues import Served
from tests.helpers.http import CLIENT
from tests.helpers.service_server import MemoryCollection, data_uri, png, running
from tests.helpers.tiny_towers import ColourTowers


@pytest.fixture(scope="module")
def address():
    with running(Served("tiny", ColourTowers().eval(), collection=MemoryCollection())) as url:
        yield url


def test_items_are_stored_found_and_removed(address):
    at = f"{address}/v1/items"
    body = {"image": data_uri(png("red")), "metadata": {"family": "noto", "year": 2017, "good": True, "share": 0.5}}
    assert CLIENT.put(f"{at}/a%2Fb 1", json=body).json() == {"stored": 1}
    many = [{"id": colour, "text": colour, "metadata": {"family": "plain"}} for colour in ("green", "blue", "white")]
    assert CLIENT.post(at, json={"items": many, "mode": "add"}).json() == {"stored": 3}
    assert CLIENT.get(at).json()["count"] == 4
    assert CLIENT.get(at, params={"where": "family = 'noto'"}).json()["count"] == 1
    stored = CLIENT.get(f"{at}/a%2Fb 1").json()
    assert stored == {"id": "a/b 1", "metadata": body["metadata"], "vector": None}
    vector = CLIENT.get(f"{at}/blue", params={"vector": True}).json()["vector"]
    for query in ({"text": "rot"}, {"image": data_uri(png("red"))}):
        hits = CLIENT.post(f"{address}/v1/search", json=query | {"k": 2}).json()["data"]
        assert [hit["id"] for hit in hits][0] == "a/b 1"
        assert len(hits) == 2
    assert CLIENT.post(f"{address}/v1/search", json={"vector": vector}).json()["data"][0]["id"] == "blue"
    found = CLIENT.post(f"{address}/v1/search", json={"text": "red", "where": "family = 'plain'"}).json()["data"]
    assert {hit["id"] for hit in found} == {"green", "blue", "white"}
    conflict = CLIENT.post(at, json={"items": many[:1], "mode": "add"})
    assert conflict.status_code == 409
    assert "green" in conflict.json()["error"]["message"]
    assert CLIENT.delete(f"{at}/green").json() == {"id": "green", "deleted": True}
    assert CLIENT.delete(f"{at}/green").status_code == 404
    assert CLIENT.get(f"{at}/green").status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("search", {}, "exactly one"),
        ("search", {"text": "a", "vector": [1.0]}, "exactly one"),
        ("search", {"vector": [1.0]}, "this collection's have 8"),
        ("search", {"vector": [0.0] * 8}, "length above 0"),
        ("search", {"vector": [1e300] * 8}, "length above 0"),
        ("search", {"text": "a", "k": 0}, "k must be at least 1"),
        ("search", {"text": "a", "k": 10**6}, "at most 1000"),
        ("search", {"text": "a", "where": "drop table"}, "a condition is"),
        ("items", {"items": [{"id": "a", "text": "x"}] * 2}, "given twice"),
        ("items", {"items": [{"id": "", "text": "x"}]}, "id"),
        ("items", {"items": [{"id": "a", "text": "x", "metadata": {"a b": 1}}]}, "metadata"),
        ("items", {"items": [{"id": "a", "text": "x", "metadata": {"a": []}}]}, "metadata.a must be a text, true or"),
        ("items", {"items": [{"id": "a", "text": "x", "metadata": {"a": 2**63}}]}, "metadata"),
        ("items", {"items": [{"id": "a"}]}, "exactly one"),
    ],
)
def test_what_cannot_be_searched_or_stored_is_a_400(address, path, body, message):
    answer = CLIENT.post(f"{address}/v1/{path}", json=body)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
