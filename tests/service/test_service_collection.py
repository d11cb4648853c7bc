"""The items and search routes on the embedded collection itself, where other tests have one in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mmwudao.service.opening import open_served
from mmwudao.service.queues import Served
from mmwudao.service.settings import ServeSettings
from retrieval.collections.lance import LanceCollection
from retrieval.collections.opening import open_collection
from retrieval.towers.base import save_towers
from tests.helpers.http import CLIENT
from tests.helpers.service_server import data_uri, png, running
from tests.helpers.tiny_towers import ColourTowers, tiny_towers


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collection") / "items"
    with (
        open_collection(folder, create=True, dim=8) as collection,
        running(Served("tiny", ColourTowers().eval(), collection=collection)) as url,
    ):
        items = [
            {"id": name, "text": name, "metadata": {"family": "plain", "year": 2010}} for name in ("green", "blue")
        ]
        assert CLIENT.post(f"{url}/v1/items", json={"items": items, "mode": "add"}).status_code == 200
        body = {"image": data_uri(png("red")), "metadata": {"family": "noto", "year": 2017}}
        assert CLIENT.put(f"{url}/v1/items/a%2Fb", json=body).status_code == 200
        yield url


def test_what_was_stored_is_found(address):
    hits = CLIENT.post(f"{address}/v1/search", json={"text": "red"}).json()["data"]
    assert hits[0]["id"] == "a/b"
    assert hits[0]["score"] == pytest.approx(1, abs=1e-3)
    body = {"text": "red", "where": "family = 'plain' AND year < 2015"}
    hits = CLIENT.post(f"{address}/v1/search", json=body).json()["data"]
    assert {hit["id"] for hit in hits} == {"green", "blue"}
    assert CLIENT.get(f"{address}/v1/items", params={"where": "year > 2015"}).json()["count"] == 1


def test_terms_are_added_and_subtracted(address):
    def found(*terms):
        return CLIENT.post(f"{address}/v1/search", json={"terms": list(terms), "k": 1})

    red = {"image": data_uri(png("red"))}
    assert found(red).json()["data"][0]["id"] == "a/b"
    assert found({"text": "cyan"}, {"text": "blue", "weight": -2}).json()["data"][0]["id"] == "green"
    assert found({"text": "cyan"}, {"text": "green", "weight": -2}).json()["data"][0]["id"] == "blue"
    for terms, problem in (
        ([], "must not be empty"),
        ([red, {"text": "red", "weight": -1}, {"text": "red", "weight": 0}], "weight"),
        ([{"text": "red"}, {"text": "red", "weight": -1}], "cancel out"),
        ([{"text": "red", "image": "x"}], "exactly one"),
        ([{"text": "red"}] * 33, "at most 32"),
        ([{"vector": [1.0]}], "this collection"),
    ):
        answer = found(*terms)
        assert answer.status_code == 400, answer.text
        assert problem in answer.json()["error"]["message"]
    both = {"text": "red", "terms": [red]}
    assert CLIENT.post(f"{address}/v1/search", json=both).status_code == 400


@pytest.mark.parametrize(
    "where", ["drop table", "colour = 'red'", "family = 1", "family = 'plain' AND (", "\0", "family = '", "(" * 3000]
)
def test_a_condition_that_cannot_be_read_is_the_clients_mistake(address, where):
    answer = CLIENT.post(f"{address}/v1/search", json={"text": "red", "where": where})
    assert answer.status_code == 400, answer.text
    assert "\n" not in answer.json()["error"]["message"]


def test_metadata_that_does_not_fit_is_the_clients_mistake(address):
    for metadata in ({"family": 5}, {"vector": 1}, {"id": "x"}):
        answer = CLIENT.put(f"{address}/v1/items/x", json={"text": "red", "metadata": metadata})
        assert answer.status_code == 400, answer.text
    assert CLIENT.get(f"{address}/v1/items/x").status_code == 404


def test_the_service_takes_durable_for_its_collection(tmp_path):
    towers = str(save_towers(tiny_towers(), tmp_path / "towers"))
    settings = ServeSettings(model=towers, collection=str(tmp_path / "items"), device="cpu", durable=True)
    served = open_served(settings)
    assert isinstance(served.collection, LanceCollection)
    assert served.collection.durable
    served.close()
    with pytest.raises(ValueError, match="give --collection"):
        open_served(replace(settings, collection=None))
