"""Clients as they are: what they send by default is taken, and what they get wrong is told in words."""

from __future__ import annotations

import base64
import gzip
import textwrap
from urllib.parse import quote

import httpx2
import openai
import pytest

from mmwudao.service.queues import Served
from mmwudao.service.settings import ServiceConfig
from tests.helpers.http import CLIENT
from tests.helpers.service_server import data_uri, png, running, tiny_served
from tests.helpers.tiny_towers import ColourTowers

RED = data_uri(png())


@pytest.fixture(scope="module")
def address(tiny_model_dir):
    with running(tiny_served(tiny_model_dir)) as url:
        yield url


def ask(address: str, path: str, body: object) -> httpx2.Response:
    return CLIENT.post(f"{address}/v1/{path}", json=body)


# what is taken


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("embeddings", {"input": "red", "encoding_format": None, "dimensions": None, "user": None, "model": None}),
        ("embeddings", {"input": [{"text": "red", "image": None}]}),
        ("images/generations", {"prompt": "cat", "n": None, "seed": None, "size": None, "temperature": None}),
        ("images/generations", {"prompt": "cat", "quality": "auto", "background": "opaque", "moderation": "auto"}),
        ("images/generations", {"prompt": "cat", "quality": "standard", "background": "auto", "moderation": "low"}),
        ("images/generations", {"prompt": "cat", "quality": None, "background": None, "output_compression": 100}),
        ("images/generations", {"prompt": "cat", "output_format": "png", "response_format": "b64_json"}),
        ("captions", {"images": [RED], "language": None, "model": None}),
        ("rerank", {"query": "red", "documents": [RED], "by": None, "top_n": None, "return_documents": False}),
        ("search", {"text": "red", "image": None, "vector": None, "k": None, "where": None}),
        ("items", {"items": [{"id": "n", "text": "red", "image": None, "metadata": None}], "mode": None}),
        ("items", {"items": [{"id": "n", "text": "red", "metadata": {"year": None, "a": 1}}]}),
    ],
)
def test_null_and_what_asks_for_nothing_is_taken(address, path, body):
    answer = ask(address, path, body)
    assert answer.status_code == 200, answer.text


def test_the_description_says_that_null_is_nothing(address):
    schemas = CLIENT.get(f"{address}/openapi.json").json()["components"]["schemas"]
    fields = schemas["GenerationRequest"]["properties"]
    assert {"type": "null"} in fields["n"]["anyOf"]
    assert fields["n"]["default"] == 1
    assert fields["prompt"]["type"] == "string"


def test_a_model_can_be_looked_up(address):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="any")
    card = client.models.retrieve("tiny")
    assert (card.id, card.object) == ("tiny", "model")
    assert card.created > 1_700_000_000
    assert client.models.list().data[0] == card
    with pytest.raises(openai.NotFoundError, match="no model of that name here: this server has 'tiny'"):
        client.models.retrieve("gpt-image-1")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/healthz", "/v1/items", "/openapi.json", "/docs"])
def test_head_is_get_without_the_body(address, path):
    head, whole = CLIENT.head(address + path), CLIENT.get(address + path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]
    assert head.headers["content-type"] == whole.headers["content-type"]


def test_head_of_what_is_not_there_is_no_success(address):
    assert CLIENT.head(f"{address}/v1/models/other").status_code == 404
    assert CLIENT.head(f"{address}/v1/embeddings").status_code == 405


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png;base64," + "\n".join(textwrap.wrap(base64.b64encode(png()).decode(), 76)),
        "data:image/png;base64," + "\r\n".join(textwrap.wrap(base64.b64encode(png()).decode(), 64)) + "\r\n",
        "\n data:image/png;base64, " + base64.b64encode(png()).decode(),
        "data:image/png;base64," + quote(base64.b64encode(png()).decode(), safe=""),
        "DATA:image/png;charset=utf-8;BASE64," + base64.b64encode(png()).decode(),
    ],
)
def test_data_uris_may_have_line_breaks_and_percent_signs(address, uri):
    expected = ask(address, "embeddings", {"input": RED}).json()["data"]
    assert ask(address, "embeddings", {"input": uri}).json()["data"] == expected
    assert ask(address, "captions", {"images": [uri]}).status_code == 200


ODD_IDS = [
    "a/b", "/a", "a/", "//", ".", "..", "a/../b", "a\nb", "\n", "a\n", "a?b=c#d", "%2F", "a b", " ", "+", "get",
    "delete", "ids", "क्लब", "😀", "a\tb", "x" * 512, "&", ";", "'", '"', "\\", "\x7f", "\u2028",
]  # fmt: skip


def test_every_id_that_can_be_stored_can_be_read_and_deleted(address):
    ask(address, "items/delete", {"ids": ["n"]})
    items = [{"id": one, "vector": [1.0] * 8} for one in ODD_IDS]
    assert ask(address, "items", {"items": items}).json() == {"stored": len(ODD_IDS)}
    found = ask(address, "items/get", {"ids": ODD_IDS}).json()["data"]
    assert [one["id"] for one in found] == ODD_IDS
    for one in ODD_IDS:
        if one not in (".", "..", "a/../b"):  # clients, and the standard of URLs, resolve these
            place = f"{address}/v1/items/{quote(one, safe='')}"
            assert CLIENT.get(place).json()["id"] == one
            assert CLIENT.delete(place).json() == {"id": one, "deleted": True}
    assert ask(address, "items/delete", {"ids": [*ODD_IDS, "absent"]}).json() == {"deleted": 3}
    assert ask(address, "items/get", {"ids": ODD_IDS}).json()["data"] == []


def test_ids_are_listed_page_by_page(address):
    names = [f"page-{k}" for k in range(7)]
    ask(address, "items", {"items": [{"id": one, "vector": [1.0] * 8, "metadata": {"of": "p"}} for one in names]})
    listed: list[str] = []
    while page := CLIENT.get(
        f"{address}/v1/items", params={"where": "of = 'p'", "limit": 3, "after": listed[-1] if listed else ""}
    ).json()["ids"]:
        listed += page
    assert listed == names
    assert "ids" not in CLIENT.get(f"{address}/v1/items").json()
    assert ask(address, "items/delete", {"ids": names}).json() == {"deleted": 7}


# what is told


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("embeddings", {"input": 3}, "input", "input must be a text, an object or a list"),
        ("embeddings", {"input": ["a", None]}, "input[1]", "input[1] must be a text or an object"),
        ("embeddings", {"input": {"txt": "a"}}, "input.txt", "input.txt: there is no such field"),
        ("embeddings", {"input": {"text": 3}}, "input.text", "input.text must be a text"),
        ("embeddings", {"input": []}, "input", "input must not be empty"),
        ("embeddings", {"input": [1, 2]}, "input", "send texts"),
        ("embeddings", {"input": [[1, 2]]}, "input", "send texts"),
        ("embeddings", {"input": ["a", ""]}, "input[1]", "an empty text"),
        ("embeddings", {"input": ["a", "data:image/png;base64,AAAA"]}, "input[1]", "picture"),
        ("embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format", "must be 'float' or 'base64'"),
        ("embeddings", {}, "input", "input is missing"),
        ("embeddings", {"input": None}, "input", "input is missing"),
        ("embeddings", [], None, "the body must be an object"),
        ("images/generations", {"prompt": ["a"]}, "prompt", "prompt must be a text"),
        ("images/generations", {"prompt": "a", "n": 1.5}, "n", "n must be a whole number"),
        ("images/generations", {"prompt": "a", "n": "many"}, "n", "n must be a whole number"),
        ("images/generations", {"prompt": "a", "quality": "hd"}, "quality", "quality must be 'auto' or 'standard'"),
        ("images/generations", {"prompt": "a", "background": "transparent"}, "background", "'auto' or 'opaque'"),
        ("images/generations", {"prompt": "a", "sise": "1"}, "sise", "there is no such field"),
        ("images/generations", {"prompt": "a", "top_p": 2}, "top_p", "top_p must be at most 1"),
        ("images/generations", {"prompt": "a", "stream": 7}, "stream", "stream must be true or false"),
        ("images/generations", {"prompt": "\u200b"}, "prompt", "an empty prompt"),
        ("images/generations", {"prompt": "a" * 1001}, "prompt", "at most 1000"),
        ("images/generations", {"prompt": "a", "style": "none such"}, "style", "unknown style"),
        ("embeddings", {"input": "\u200b"}, "input", "an empty text"),
        ("captions", {"images": "a"}, "images", "images must be a list"),
        ("captions", {"images": [RED, 3]}, "images[1]", "images[1] must be a text or an object"),
        ("captions", {"images": [RED, "no"]}, "images[1]", "data URI"),
        ("rerank", {"query": "a", "documents": [RED], "by": "me"}, "by", "by must be 'caption', 'towers' or 'both'"),
        ("search", {"image": "no"}, "image", "data URI"),
        ("search", {"text": " "}, "text", "an empty text"),
        ("search", {"text": "a", "where": "drop"}, "where", "a condition"),
        ("search", {"vector": [1.0, "x"]}, "vector[1]", "vector[1] must be a number"),
        ("search", {"vector": [1.0]}, "vector", "this collection's have 8"),
        ("search", {}, None, "exactly one"),
        ("items", {"items": [{"id": "a", "text": "x"}, {"text": "x"}]}, "items[1].id", "items[1].id is missing"),
        ("items", {"items": [{"id": "a"}]}, "items[0]", "exactly one"),
        ("items", {"items": [{"id": "a", "image": "no"}]}, "items[0].image", "data URI"),
        ("items", {"items": [{"id": "a", "vector": [1]}]}, "items[0].vector", "this collection's have 8"),
        ("items", {"items": [{"id": "", "text": "x"}]}, "items[0].id", "must not be empty"),
        (
            "items",
            {"items": [{"id": "a", "text": "x", "metadata": {"str": [1]}}]},
            "items[0].metadata.str",
            "must be a text, true or false or a number",
        ),
        (
            "items",
            {"items": [{"id": "a", "text": "x", "metadata": {"a b": 1}}]},
            "items[0].metadata.a b",
            "is no name of a column",
        ),
        (
            "items",
            {"items": [{"id": "a", "text": "x", "metadata": {"_a": 1}}]},
            "items[0].metadata._a",
            "is no name of a column",
        ),
    ],
)
def test_mistakes_are_told_in_words_with_the_users_names(address, path, body, param, message):
    answer = ask(address, path, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["param"] == param
    assert not any(word in error["message"] for word in ("Input should", "valid ", "constrained", "pydantic"))


@pytest.mark.parametrize("path", ["embeddings", "images/generations", "search", "items"])
def test_a_body_that_is_no_json_is_told_so(address, path):
    json = {"Content-Type": "application/json"}
    answer = CLIENT.post(f"{address}/v1/{path}", content=b'{"a": ', headers=json)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, None)
    assert answer.json()["error"]["message"].startswith("the body is not JSON")
    answer = CLIENT.post(f"{address}/v1/{path}", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("images/generations", '{"prompt": "a", "temperature": NaN}', "temperature", "must be a finite number"),
        ("images/generations", "[" * 100_000, None, "the body cannot be read: send JSON in UTF-8"),
        ("images/generations", gzip.compress(b'{"prompt": "a"}', mtime=0), None, "not compressed"),
        ("embeddings", gzip.compress(b'{"input": "a"}', mtime=0), None, "the body is not JSON"),
        (
            "items",
            '{"items": [{"id": "a", "text": "x", "metadata": {"a": "\\ud83d"}}]}',
            "items[0].metadata.a",
            "is not valid Unicode",
        ),
    ],
)
def test_bodies_that_no_client_library_writes_are_told_in_words(address, path, body, param, message):
    answer = httpx2.post(f"{address}/v1/{path}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param


def test_wrong_addresses_and_methods_are_told_in_words(address):
    answer = CLIENT.get(f"{address}/v1/engines")
    assert answer.json()["error"]["message"].startswith("there is no such address here")
    answer = CLIENT.delete(f"{address}/v1/embeddings")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "this address takes POST" in answer.json()["error"]["message"]


def test_a_prompt_that_is_cut_says_what_was_read(address):
    prompt = "红心、" * 200
    for stream in (False, True):
        answer = ask(address, "images/generations", {"prompt": prompt, "stream": stream})
        assert answer.status_code == 200
        assert "revised_prompt" in answer.text
        assert "\\ufffd" not in answer.text
    (one,) = ask(address, "images/generations", {"prompt": prompt}).json()["data"]
    assert prompt.startswith(one["revised_prompt"])
    assert "revised_prompt" not in ask(address, "images/generations", {"prompt": "a"}).json()["data"][0]


# web pages


def test_pages_of_a_named_origin_may_ask():
    config = ServiceConfig(cors=["https://example.org"])
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with running(Served("tiny", ColourTowers().eval()), config) as url:
        for origin, allowed in (("https://example.org", "https://example.org"), ("https://evil.example", None)):
            headers = {"Origin": origin}
            asked = CLIENT.options(f"{url}/v1/embeddings", headers=headers | preflight)
            assert asked.headers.get("access-control-allow-origin") == allowed
            for path in ("embeddings", "absent"):  # a refusal is for the page to read, too
                answer = CLIENT.post(f"{url}/v1/{path}", json={"input": "red"}, headers=headers)
                assert answer.headers.get("access-control-allow-origin") == allowed


def test_without_the_option_no_page_may_ask(address):
    answer = CLIENT.get(f"{address}/v1/models", headers={"Origin": "https://example.org"})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("origins", "message"),
    [(["*"], "name the origins"), (["example.org"], "takes an origin"), (["https://example.org/a"], "takes an origin")],
)
def test_origins_that_are_none_are_refused(origins, message):
    with pytest.raises(ValueError, match=message):
        ServiceConfig(cors=origins)
    assert ServiceConfig(cors=["*"], keys=("k" * 16,)).cors == ["*"]
