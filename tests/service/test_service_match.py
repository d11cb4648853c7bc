"""Vectors and search over HTTP by a generator's own vectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmwudao.loading.vectors import load_vector_maker
from mmwudao.service.opening import open_served
from mmwudao.service.settings import ServeSettings
from retrieval.collections.opening import CollectionError
from retrieval.towers.base import save_towers
from tests.helpers.http import CLIENT
from tests.helpers.service_server import data_uri, png, running
from tests.helpers.tiny_towers import tiny_towers
from vqvae.storage.parts import ModelError, content_hash


@pytest.fixture(scope="module")
def settings(matching_model_dir, tmp_path_factory):
    collection = str(tmp_path_factory.mktemp("matched") / "items")
    return ServeSettings(model=str(matching_model_dir), by="generator", collection=collection, device="cpu")


@pytest.fixture(scope="module")
def address(settings):
    served = open_served(settings)
    with running(served) as url:
        yield url
    served.close()


def test_vectors_are_those_of_the_generator(address, matching_model_dir):
    towers = load_vector_maker("generator", matching_model_dir, "cpu")
    answer = CLIENT.post(f"{address}/v1/embeddings", json={"input": ["红心", "a red apple"]}).json()
    found = torch.tensor([one["embedding"] for one in answer["data"]])
    torch.testing.assert_close(found, towers.encode_text(["红心", "a red apple"]), atol=1e-5, rtol=1e-5)
    tokens = towers.count_tokens(towers.tokenize(["红心", "a red apple"]))
    assert answer["usage"]["prompt_tokens"] == sum(tokens)
    answer = CLIENT.post(f"{address}/v1/embeddings", json={"input": data_uri(png("red"))})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"][0]["embedding"]) == 8


def test_what_was_stored_is_found(address, matching_model_dir):
    items = [{"id": name, "text": name} for name in ("green", "blue", "red heart")]
    assert CLIENT.post(f"{address}/v1/items", json={"items": items, "mode": "add"}).status_code == 200
    body = {"image": data_uri(png("red"))}
    assert CLIENT.put(f"{address}/v1/items/picture", json=body).status_code == 200
    hits = CLIENT.post(f"{address}/v1/search", json={"text": "blue"}).json()["data"]
    assert hits[0]["id"] == "blue"
    hits = CLIENT.post(f"{address}/v1/search", json=body).json()["data"]
    assert hits[0]["id"] == "picture"
    # the collection names what made its vectors
    told = CLIENT.get(f"{address}/v1/items").json()
    assert told["model"] == content_hash(load_vector_maker("generator", matching_model_dir, "cpu"))


def test_what_cannot_be_served_is_refused(settings, tiny_model_dir, tmp_path):
    with pytest.raises(ModelError, match="makes no vectors"):
        open_served(replace(settings, model=str(tiny_model_dir)))
    with pytest.raises(ValueError, match="leave out --towers"):
        open_served(replace(settings, towers="emoji"))
    folder = str(save_towers(tiny_towers(), tmp_path / "towers"))
    with pytest.raises(ModelError, match="a part alone"):
        open_served(replace(settings, model=folder))
    open_served(settings).close()  # now there is a collection
    with pytest.raises(CollectionError, match=r"other towers \(\w{12}, not \w{12}\)"):
        open_served(replace(settings, model=folder, by="towers"))
