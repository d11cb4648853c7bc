"""`/v1/embeddings` on a real server: by the unmodified OpenAI client, with pictures, and with what is wrong."""

from __future__ import annotations

import base64
import json

import numpy
import openai
import pytest

from mmwudao.service.queues import Served
from mmwudao.service.settings import ServiceConfig
from tests.helpers.http import CLIENT
from tests.helpers.service_server import data_uri, png, running
from tests.helpers.tiny_towers import ColourTowers

TOWERS = ColourTowers().eval()


@pytest.fixture(scope="module")
def address():
    with running(Served("tiny", TOWERS), ServiceConfig(max_inputs=32, max_body=2**20, max_pixels=10_000)) as url:
        yield url


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        yield client


def post(address, **body):
    return CLIENT.post(f"{address}/v1/embeddings", json=body)


def test_the_openai_client_gets_the_towers_vectors(client):
    texts = ["a red square", "ein blauer Fisch", "nothing"]
    answer = client.embeddings.create(model="tiny", input=texts)
    assert [one.index for one in answer.data] == [0, 1, 2]
    found = numpy.array([one.embedding for one in answer.data])
    numpy.testing.assert_allclose(found, TOWERS.encode_text(texts).numpy(), atol=1e-6)
    assert answer.usage.total_tokens > 0
    assert client.models.list().data[0].id == "tiny"


def test_float_and_base64_are_the_same_numbers(address):
    numbers = post(address, input="red").json()["data"][0]["embedding"]
    packed = post(address, input="red", encoding_format="base64").json()["data"][0]["embedding"]
    assert numpy.frombuffer(base64.b64decode(packed), "<f4").tolist() == numbers
    assert len(numbers) == 8


def test_pictures_and_texts_in_one_request_keep_their_order(client):
    uri = data_uri(png("blue"))
    answer = client.embeddings.create(model="tiny", input=["red", uri, "blue", data_uri(png("red"))])
    red, blue_picture, blue, red_picture = (numpy.array(one.embedding) for one in answer.data)
    assert blue_picture @ blue == pytest.approx(1, abs=1e-3)
    assert red_picture @ red == pytest.approx(1, abs=1e-3)
    assert red @ blue < 0.9


def test_parts_say_what_they_are(address):
    uri = data_uri(png("red"))
    as_text, as_picture = post(address, input=[{"text": uri}, {"image": uri}]).json()["data"]
    assert as_text["embedding"] == post(address, input="nothing").json()["data"][0]["embedding"]
    assert as_picture["embedding"] == post(address, input=uri).json()["data"][0]["embedding"]


def test_pictures_are_uploaded_as_a_form(address):
    files = [("file", ("../../etc/passwd", png("red"), "image/png")), ("file", ("b", png("blue"), "image/png"))]
    answer = CLIENT.post(f"{address}/v1/embeddings", files=files, data={"encoding_format": "float"})
    assert answer.status_code == 200, answer.text
    expected = post(address, input=[data_uri(png("red")), data_uri(png("blue"))]).json()
    assert answer.json()["data"] == expected["data"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": [1, 2, 3]}, 400, "input"),
        ({"input": " "}, 400, "an empty text"),
        ({"input": "x" * 9000}, 400, "at most 8192"),
        ({"input": ["x"] * 33}, 400, "at most 32"),
        ({"input": "x", "model": "other"}, 404, "this server has 'tiny'"),
        ({"input": "x", "dimensions": 3}, 400, "8 dimensions"),
        ({"input": "x", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": "x", "colour": "red"}, 400, "colour"),
        ({"input": {"image": "https://example.com/a.png"}}, 400, "fetches no URLs"),
        ({"input": {"image": "file:///etc/passwd"}}, 400, "data URI"),
        ({"input": {"image": "/etc/passwd"}}, 400, "data URI"),
        ({"input": "data:image/png;base64,???"}, 400, "base64"),
        ({"input": "data:image/png,abc"}, 400, "data URI"),
        ({"input": data_uri(b"")}, 400, "empty file"),
        ({"input": data_uri(b"no picture")}, 400, "not a picture"),
        ({"input": data_uri(png(size=(200, 200)))}, 413, "the cap is 10000"),
    ],
)
def test_what_cannot_be_used_is_one_line_in_openais_form(address, body, status, message):
    answer = post(address, **body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert "\n" not in error["message"]


def test_the_openai_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="this server has"):
        client.embeddings.create(model="other", input="red")
    with pytest.raises(openai.BadRequestError, match="an empty text"):
        client.embeddings.create(model="tiny", input="")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b'"\xff"', b'{"input": "\\ud800"}', b'{"input": 1e999}', b"null"]
)
def test_what_is_no_json_is_a_400(address, content):
    answer = CLIENT.post(f"{address}/v1/embeddings", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert json.loads(answer.text)["error"]["message"]


def test_a_body_beyond_the_cap_is_refused(address):
    answer = post(address, input="x" * 2**20)
    assert answer.status_code == 413
    chunks = (b" " * 2**16 for _ in range(40))
    answer = CLIENT.post(f"{address}/v1/embeddings", content=chunks, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_a_server_without_a_generator_says_so(address):
    for path, body in (
        ("images/generations", {"prompt": "a cat"}),
        ("captions", {"images": [data_uri(png())]}),
        ("search", {"text": "red"}),
    ):
        answer = CLIENT.post(f"{address}/v1/{path}", json=body)
        assert answer.status_code == 404
        assert "this server has no" in answer.json()["error"]["message"]
