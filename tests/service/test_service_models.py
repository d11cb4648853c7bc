"""Every route on every kind of model: what the server lacks is a 404, a user's mistake a 4xx, and nothing a 500."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal

import httpx2
import pytest

from mmwudao.loading.model_dir import Part
from mmwudao.service.draw_requests import DrawRequest
from mmwudao.service.errors import BadInput, as_http_error, refusals
from mmwudao.service.generators import LocalGenerator
from mmwudao.service.queues import Served
from mmwudao.service.settings import ServiceConfig
from tests.helpers.cogview import imported_model
from tests.helpers.http import CLIENT
from tests.helpers.service_server import MemoryCollection, data_uri, png, running, tiny_pipeline
from tests.helpers.tiny_towers import ColourTowers

RED = data_uri(png())
ASKED = [{"type": "text", "text": "red?"}, {"type": "image_url", "image_url": {"url": RED}}]
CHAT = {"messages": [{"role": "user", "content": ASKED}]}
# route, a body of the right shape, and what the server needs for it
ROUTES: list[tuple[str, str, Any, set[str]]] = [
    ("POST", "/v1/embeddings", {"input": ["red", RED]}, {"embed"}),
    ("POST", "/v1/images/generations", {"prompt": "cat"}, {"draw"}),
    ("POST", "/v1/images/generations", {"prompt": "cat", "stream": True, "partial_images": 1}, {"draw"}),
    ("POST", "/v1/captions", {"images": [RED]}, {"draw", "caption"}),
    ("POST", "/v1/rerank", {"query": "red", "documents": [RED], "by": "caption"}, {"draw", "caption"}),
    ("POST", "/v1/rerank", {"query": "red", "documents": [RED], "by": "both"}, {"draw", "caption", "judge"}),
    ("POST", "/v1/chat/completions", CHAT, {"draw", "answer"}),
    ("POST", "/v1/chat/completions", {**CHAT, "stream": True, "among": ["yes", "no"]}, {"draw", "answer"}),
    ("POST", "/v1/search", {"text": "red"}, {"embed", "search"}),
    ("POST", "/v1/search", {"vector": [1.0] * 8}, {"search"}),
    ("POST", "/v1/items", {"items": [{"id": "a", "text": "red"}]}, {"embed", "search"}),
    ("PUT", "/v1/items/b", {"image": RED}, {"embed", "search"}),
    ("GET", "/v1/items", None, {"search"}),
    ("GET", "/v1/items/b", None, {"search"}),
    ("DELETE", "/v1/items/b", None, {"search"}),
    ("POST", "/v1/items/get", {"ids": ["a"]}, {"search"}),
    ("POST", "/v1/items/delete", {"ids": ["a"]}, {"search"}),
    ("GET", "/v1/models", None, set()),
    ("GET", "/v1/models/tiny", None, set()),
]
# of the right shape, but impossible
IMPOSSIBLE: list[tuple[str, str, Any]] = [
    ("POST", "/v1/embeddings", {"input": " "}),
    ("POST", "/v1/embeddings", {"input": ["data:image/png;base64,AAAA"]}),
    ("POST", "/v1/embeddings", {"input": "red", "dimensions": 3}),
    ("POST", "/v1/images/generations", {"prompt": ""}),
    ("POST", "/v1/images/generations", {"prompt": "cat", "style": "cubism", "stream": True}),
    ("POST", "/v1/images/generations", {"prompt": "\ud800"}),
    ("POST", "/v1/images/generations", {"prompt": "cat", "size": "1x1"}),
    ("POST", "/v1/captions", {"images": ["no picture"]}),
    ("POST", "/v1/captions", {"images": [RED], "language": "tlh"}),
    ("POST", "/v1/rerank", {"query": " ", "documents": [RED]}),
    ("POST", "/v1/rerank", {"query": "red", "documents": ["data:image/png;base64,AAAA"]}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "red?"}]}),
    ("POST", "/v1/chat/completions", {**CHAT, "language": "tlh"}),
    ("POST", "/v1/search", {"vector": [1.0]}),
    ("POST", "/v1/search", {"text": "red", "where": "?"}),
    ("POST", "/v1/items", {"items": [{"id": "a", "text": "red"}] * 2}),
    ("PUT", "/v1/items/x", {"vector": [0.0] * 8}),
    ("GET", "/v1/items?where=x", None),
    ("GET", "/v1/items/absent", None),
    ("DELETE", "/v1/items/absent", None),
]
WRONG_FIELDS = {"input": 3, "prompt": [], "images": 1, "query": {}, "items": "a", "messages": 1}
WRONG_SHAPES: list[Any] = [[], {}, "text", 3, None, WRONG_FIELDS]
KINDS = ("draws only", "captions", "towers only", "all", "judges", "names no language", "imported", "imported, silent")
# in place of a field's value
WRONG_VALUES: list[Any] = [
    None, True, 0, -1, 2**63, 10**400, 0.5, 1e308, "", " ", "\ud800", "\0", "x" * 9000, "data:image/png;base64,",
    "http://127.0.0.1/", [], [[]], [None], ["a", 3], [1.0], {}, {"text": None}, {"image": "a"}, {"a": {"b": []}},
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tiny_model_dir, imported_dir):
    """The address of a server of one kind of model, and what it has."""
    abilities = {
        "draws only": {"draw"},
        "captions": {"draw", "caption", "answer"},
        "towers only": {"embed"},
        "all": {"draw", "caption", "answer", "embed", "search"},
        "judges": {"draw", "caption", "answer", "embed", "search", "judge"},
        "names no language": {"draw"},
        "imported": {"draw", "caption"},
        "imported, silent": {"draw", "caption"},
    }[request.param]
    folder = imported_dir if request.param.startswith("imported") else tiny_model_dir
    generator = LocalGenerator(tiny_pipeline(folder)) if "draw" in abilities else None
    if generator is not None:
        pipeline = generator.pipeline
        if "caption" not in abilities:  # else it says what it can do
            told: Literal["tagged", "no"] = "tagged" if request.param == "names no language" else "no"
            pipeline.config = replace(pipeline.config, describes=told, languages=())
        if request.param == "imported, silent":
            pipeline.config = replace(pipeline.config, languages=())
        if "judge" in abilities:
            pipeline.config = replace(pipeline.config, parts={**pipeline.config.parts, "towers": Part("towers", "")})
            pipeline.towers = ColourTowers().eval()
    towers = ColourTowers().eval() if "embed" in abilities else None
    collection = MemoryCollection() if "search" in abilities else None
    with running(Served("tiny", towers, generator, collection)) as url:
        yield url, abilities


@pytest.fixture(scope="module")
def imported_dir(tmp_path_factory):
    return imported_model(tmp_path_factory.mktemp("imported"))


def send(address: str, method: str, path: str, body: Any) -> httpx2.Response:
    content = json.dumps(body).encode() if body is not None else None
    headers = {"Content-Type": "application/json"} if body is not None else {}
    return CLIENT.request(method, address + path, content=content, headers=headers)


def test_what_fits_is_answered_where_the_server_can(kind):
    address, abilities = kind
    for method, path, body, needed in ROUTES:
        answer = send(address, method, path, body)
        if needed <= abilities:
            assert answer.status_code == 200, (method, path, answer.text)
            assert "event: error" not in answer.text
        else:
            assert answer.status_code in (400, 404), (method, path, answer.text)
            assert answer.json()["error"]["type"] == "invalid_request_error"


def test_what_does_not_fit_is_a_4xx_everywhere(kind):
    address, _ = kind
    for method, path, body in IMPOSSIBLE:
        answer = send(address, method, path, body)
        assert 400 <= answer.status_code < 500, (method, path, body, answer.text)
        assert "\n" not in answer.json()["error"]["message"]
    for method, path, body, _ in ROUTES:
        if body is not None:
            for wrong in WRONG_SHAPES:
                answer = send(address, method, path, wrong)
                assert 400 <= answer.status_code < 500, (method, path, wrong, answer.text)
    assert send(address, "GET", "/readyz", None).status_code == 200


def test_no_value_of_any_field_is_a_500(kind):
    address, _ = kind
    paths = ("/v1/items/%00", "/v1/items/" + "x" * 600, "/v1/items?limit=0", "/v1/items?limit=9999", "/v1/models/%ff")
    for method, path, right, _ in ROUTES:
        for field in right or ():
            for value in WRONG_VALUES:
                answer = send(address, method, path, {**right, field: value})
                assert answer.status_code < 500, (method, path, field, value, answer.text)
                assert "the server failed" not in answer.text
    for path in paths:
        for method in ("GET", "PUT", "DELETE", "HEAD", "PATCH"):
            assert 200 <= send(address, method, path, None).status_code < 500, (method, path)


def test_a_model_that_only_draws_says_so(tiny_model_dir):
    pipeline = tiny_pipeline(tiny_model_dir)
    pipeline.config = replace(pipeline.config, describes="no", languages=())
    with running(Served("tiny", generator=LocalGenerator(pipeline))) as url:
        for path, body in (
            ("captions", {"images": [RED]}),
            ("rerank", {"query": "red", "documents": [RED]}),
        ):
            answer = send(url, "POST", f"/v1/{path}", body)
            assert answer.status_code == 400
            assert "only draws" in answer.json()["error"]["message"]


def test_a_language_that_has_no_name_is_left_out(imported_dir):
    pipeline = tiny_pipeline(imported_dir)
    pipeline.config = replace(pipeline.config, languages=())
    with running(Served("tiny", generator=LocalGenerator(pipeline))) as url:
        (told,) = send(url, "POST", "/v1/captions", {"images": [RED]}).json()["data"]
        assert told["language"] is None
        answer = send(url, "POST", "/v1/captions", {"images": [RED], "language": "zh"})
        assert answer.json()["error"]["param"] == "language"
        assert "leave it out" in answer.json()["error"]["message"]


# mistakes of users, and bugs


def raised(error: Exception) -> Exception:
    """The error as this module raised it."""
    with pytest.raises(type(error)) as caught:
        raise error
    return caught.value


@pytest.mark.parametrize("bug", [TypeError("x"), AssertionError("x"), KeyError("x"), ValueError("from a test")])
def test_what_our_code_did_not_refuse_is_a_bug(bug):
    told = as_http_error(raised(bug))
    assert (told.status_code, told.detail) == (500, "the server failed")
    with pytest.raises(type(bug)), refusals("n"):
        raise bug


def test_what_a_library_refuses_is_a_bug():
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("{")
    assert as_http_error(caught.value).status_code == 500


def test_what_our_code_refuses_names_the_field():
    with pytest.raises(BadInput, match="waiting_texts") as caught, refusals("n"):
        ServiceConfig(waiting_texts=1)
    assert caught.value.param == "n"


@pytest.mark.parametrize("error", [RuntimeError("secret"), ValueError("secret")])
@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_while_drawing_is_not_told(tiny_model_dir, monkeypatch, error, stream):
    def broken(pipeline: object, block: list[DrawRequest]) -> None:
        raise error

    monkeypatch.setattr("mmwudao.service.generators.draw_block", broken)
    with running(Served("tiny", generator=LocalGenerator(tiny_pipeline(tiny_model_dir)))) as url:
        answer = send(url, "POST", "/v1/images/generations", {"prompt": "cat", "stream": stream})
    assert answer.status_code == (200 if stream else 500)
    assert "the server failed" in answer.text
    assert "secret" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_mistake_found_while_drawing_is_told(tiny_model_dir, monkeypatch, stream):
    def refusing(pipeline: object, block: list[DrawRequest]) -> None:
        ServiceConfig(waiting_texts=1)

    monkeypatch.setattr("mmwudao.service.generators.draw_block", refusing)
    with running(Served("tiny", generator=LocalGenerator(tiny_pipeline(tiny_model_dir)))) as url:
        answer = send(url, "POST", "/v1/images/generations", {"prompt": "cat", "stream": stream})
    assert answer.status_code == (200 if stream else 400)
    assert "waiting_texts must be at least 256" in answer.text
    assert "invalid_request_error" in answer.text
