"""Questions about a picture over HTTP, as OpenAI's own client asks them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import openai
import pytest

from mmwudao.service.errors import BadInput
from mmwudao.service.generators import LocalGenerator
from mmwudao.service.queues import Served
from mmwudao.service.routes_chat import read_conversation
from mmwudao.service.schemas_chat import ChatMessage
from mmwudao.service.settings import ServiceConfig
from tests.helpers.http import CLIENT
from tests.helpers.service_server import data_uri, png, running, tiny_pipeline
from tests.helpers.tiny_towers import ColourTowers

RED = data_uri(png())


@pytest.fixture(scope="module")
def pipe(tiny_model_dir):
    return tiny_pipeline(tiny_model_dir)


@pytest.fixture(scope="module")
def address(pipe):
    with running(Served("tiny", generator=LocalGenerator(pipe)), ServiceConfig()) as url:
        yield url


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        yield client


def question(text: str = "这是什么颜色？", picture: str = RED) -> dict[str, Any]:
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": picture, "detail": "auto"}}]
    return {"role": "user", "content": parts}


def test_the_openai_client_gets_the_answer_of_the_pipeline(client, pipe):
    found = client.chat.completions.create(model="tiny", messages=[question()], temperature=0)
    (expected,) = pipe.ask(pipe_picture(), ["这是什么颜色？"])
    assert found.object == "chat.completion"
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected.text, "stop")
    assert expected.language == "zh"
    usage = found.usage
    assert usage.completion_tokens == expected.written
    assert usage.prompt_tokens == expected.read > 4 * 4 + len("这是什么颜色？") // 2
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def pipe_picture():
    import io

    from PIL import Image

    return Image.open(io.BytesIO(png()))


def test_an_answer_of_a_list_and_of_a_length(client, pipe):
    among = ["yes", "no", "maybe"]
    found = client.chat.completions.create(model="tiny", messages=[question("red?")], extra_body={"among": among})
    assert found.choices[0].message.content in among
    assert found.choices[0].message.content == pipe.ask(pipe_picture(), ["red?"], among=among)[0].text
    short = client.chat.completions.create(model="tiny", messages=[question("red?")], max_tokens=1)
    assert short.usage.completion_tokens == 2  # a piece, and the end


def test_a_stream_holds_the_same_answer(client):
    whole = client.chat.completions.create(model="tiny", messages=[question()])
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model="tiny", messages=[question()], stream=True, stream_options=options)
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert said == whole.choices[0].message.content
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage
    bare = list(client.chat.completions.create(model="tiny", messages=[question()], stream=True))
    assert all(chunk.usage is None for chunk in bare)


def test_a_conversation_goes_on_about_its_picture(client):
    first = client.chat.completions.create(model="tiny", messages=[question("what is it?")])
    said = first.choices[0].message.model_dump()  # with the nulls that the client fills in
    system = {"role": "system", "content": "You are helpful."}
    messages = [system, question("what is it?"), said, {"role": "user", "content": "is it red?"}]
    second = client.chat.completions.create(model="tiny", messages=messages)
    alone = client.chat.completions.create(model="tiny", messages=[question("is it red?")])
    assert second.choices[0].message.content == alone.choices[0].message.content


def test_which_picture_is_asked_about():
    def read(*messages: dict[str, Any]) -> tuple[str, str, str]:
        return read_conversation([ChatMessage(**message) for message in messages])

    assert read(question("a?", "data:1"), question("b?", "data:2")) == ("b?", "data:2", PLACE.format(1))
    later = {"role": "user", "content": [{"type": "text", "text": "c?"}, {"type": "text", "text": "d?"}]}
    assert read(question("a?", "data:1"), later) == ("c?\nd?", "data:1", PLACE.format(0))
    two = {"role": "user", "content": [*question()["content"], question()["content"][1]]}
    with pytest.raises(BadInput, match="about one picture"):
        read(two)


PLACE = "messages[{}].content[1].image_url.url"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": [{"role": "user", "content": "red?"}]}, "messages[0].content", "no picture to ask about"),
        ({"messages": [question(" ")]}, "messages[0].content", "asks nothing"),
        ({"messages": [question(), {"role": "assistant", "content": "a"}]}, "messages[1].role", "must be the user's"),
        ({"messages": [question(picture="http://127.0.0.1/a.png")]}, PLACE.format(0), "fetches no URLs"),
        ({"messages": [question(picture=data_uri(b"no picture"))]}, PLACE.format(0), "not a picture"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]", "text"),
        ({"messages": [question("x" * 9000)]}, "messages", "at most"),
        ({"messages": [question()], "language": "tlh"}, "messages", "answers in: zh, en"),
        ({"messages": [question()], "among": [" "]}, "messages", "an empty answer to choose"),
        ({"messages": [question()], "n": 2}, "n", "n must be 1"),
        ({"messages": [question()], "tools": []}, "tools", "no such field"),
    ],
)
def test_what_cannot_be_answered_is_one_line_in_openais_form(address, body, param, message):
    told = CLIENT.post(f"{address}/v1/chat/completions", json=body)
    assert told.status_code == 400, told.text
    error = told.json()["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


def test_who_cannot_answer_says_so(tiny_model_dir):
    pipeline = tiny_pipeline(tiny_model_dir)
    pipeline.config = replace(pipeline.config, answers=False)
    content = json.dumps({"messages": [question()]})
    for served, status, message in (
        (Served("tiny", generator=LocalGenerator(pipeline)), 400, "does not answer questions: it was not trained to"),
        (Served("tiny", ColourTowers().eval()), 404, "this server has no"),
    ):
        with running(served) as url:
            told = CLIENT.post(f"{url}/v1/chat/completions", content=content)
            assert (told.status_code, message in told.text) == (status, True)
            assert "answer" not in CLIENT.get(f"{url}/v1/models").json()["data"][0]["can"]
