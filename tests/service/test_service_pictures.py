"""Pictures over HTTP: drawn alone and together, streamed, cancelled, captioned, ranked, searched."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from dataclasses import replace
from typing import Any, cast

import httpx2
import openai
import pytest
import torch
from PIL import Image

from generation.captions import describe
from generation.drawing.decoding import generate_codes
from generation.drawing.sampling import SamplingOptions
from mmwudao.loading.model_dir import Part
from mmwudao.service.draw_requests import DrawRequest, draw_block, rows_of_previews
from mmwudao.service.errors import ClientsGone
from mmwudao.service.generators import LocalGenerator
from mmwudao.service.settings import ServiceConfig
from tests.helpers.http import CLIENT
from tests.helpers.service_server import data_uri, png, running, tiny_pipeline, tiny_served
from tests.helpers.tiny_towers import ColourTowers


@pytest.fixture(scope="module")
def pipe(tiny_model_dir):
    return tiny_pipeline(tiny_model_dir)


@pytest.fixture(scope="module")
def served(tiny_model_dir):
    return tiny_served(tiny_model_dir)


@pytest.fixture(scope="module")
def address(served):
    with running(served, ServiceConfig(max_pictures=8, waiting_drawings=8, drawing_window=0.2)) as url:
        yield url


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        yield client


def picture(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def metric(address: str, line: str) -> float:
    found = [row for row in CLIENT.get(f"{address}/metrics").text.splitlines() if row.startswith(line + " ")]
    return float(found[0].split()[1]) if found else 0.0


class Slowed:
    """The generator, with a pause before every step, and a count of them; it waits while `go` is not set."""

    def __init__(self, monkeypatch, seconds):
        self.steps = 0
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()
        original = generate_codes

        def slow(*arguments, on_token=None, **options):
            def count(step, codes):
                self.steps += 1
                self.begun.set()
                time.sleep(seconds)
                assert self.go.wait(120)
                on_token(step, codes)

            return original(*arguments, on_token=count, **options)

        monkeypatch.setattr("mmwudao.pipeline.generate_codes", slow)


# drawing blocks


def test_an_exception_of_on_token_stops_drawing(pipe):
    seen = []

    def stop(step, codes):
        seen.append(step)
        if step == 3:
            raise ClientsGone

    with pytest.raises(ClientsGone):
        generate_codes(pipe.generator, [[1], [2]], [1, 2], SamplingOptions(), grid=(4, 4), on_token=stop)
    assert seen == [1, 2, 3]
    assert not pipe.generator.training


def test_pictures_of_different_clients_in_one_block_are_what_they_are_alone(pipe):
    drawings = [*pipe.plan("红心", 2, seed=5), *pipe.plan("a red apple", 1, seed=9, style="noto")]
    together = draw_block(pipe, [DrawRequest(one) for one in drawings])
    alone = [*pipe.generate("红心", 2, seed=5), *pipe.generate("a red apple", seed=9, style="noto")]
    assert [one.tobytes() for one in together] == [one.tobytes() for one in alone]
    assert [one.info for one in together] == [one.info for one in alone]


def test_a_block_goes_on_for_who_stays_and_stops_when_all_have_left(pipe):
    shown: list[Image.Image] = []
    one, other = (DrawRequest(drawing, shown.append, frozenset({1, 2})) for drawing in pipe.plan("cat", 2, seed=1))
    one.gone = True
    images = draw_block(pipe, [one, other])
    assert images[1].tobytes() == pipe.generate("cat", seed=2)[0].tobytes()
    assert len(shown) == 2  # of the one who stayed
    other.gone = True
    with pytest.raises(ClientsGone):
        draw_block(pipe, [one, other])


class PassesOfAWindow:
    """A pipeline of 4 x 4 codes whose passes end inside rows, or several rows further."""

    grid = (4, 4)

    def draw(self, drawings, on_token, canvas):
        for step in (3, 7, 13, 16):
            on_token(step, torch.zeros(1, *self.grid))
        return []

    def decode_partial(self, codes, canvas):
        return [Image.new("RGB", (32, 32))]


def test_a_pass_that_ends_inside_a_row_still_has_a_preview(pipe):
    shown: list[Image.Image] = []
    (drawing,) = pipe.plan("cat", seed=1, sampling={"window": 3})
    draw_block(cast(Any, PassesOfAWindow()), [DrawRequest(drawing, shown.append, frozenset({1, 2, 3}))])
    assert len(shown) == 2, "after row 1, and after rows 2 and 3 together"


@pytest.mark.parametrize(("count", "rows"), [(0, set()), (1, {8}), (3, {4, 8, 12})])
def test_previews_are_spread_evenly(count, rows):
    assert rows_of_previews(count, 16) == rows
    assert 0 not in rows_of_previews(3, 2)


# /v1/images/generations


def test_the_openai_client_gets_the_pictures_of_the_pipeline(client, pipe):
    answer = client.images.generate(
        model="tiny", prompt="红心", n=3, size="32x32", response_format="b64_json", extra_body={"seed": 7}
    )
    expected = pipe.generate("红心", 3, seed=7)
    found = [picture(one.b64_json) for one in answer.data]
    assert [one.convert("RGB").tobytes() for one in found] == [one.tobytes() for one in expected]
    assert [one.info["seed"] for one in found] == ["7", "8", "9"]
    assert answer.size == "32x32"


def test_requests_share_a_decoding_batch(address, pipe):
    before = metric(address, 'mmwudao_batch_size_count{queue="drawings"}')
    answers: dict[int, dict] = {}

    def ask(seed: int) -> None:
        body = {"prompt": "cat", "seed": seed, "temperature": 0.8}
        answers[seed] = CLIENT.post(f"{address}/v1/images/generations", json=body).json()

    threads = [threading.Thread(target=ask, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metric(address, 'mmwudao_batch_size_count{queue="drawings"}') - before <= 2
    for seed, answer in answers.items():
        expected = pipe.generate("cat", seed=seed, sampling={"temperature": 0.8})[0]
        assert picture(answer["data"][0]["b64_json"]).convert("RGB").tobytes() == expected.tobytes()


def test_a_stream_shows_previews_then_the_picture(client, pipe):
    stream = client.images.generate(
        model="tiny", prompt="a red apple", stream=True, partial_images=3, extra_body={"seed": 3}
    )
    events = list(stream)
    assert [one.type for one in events] == [*["image_generation.partial_image"] * 3, "image_generation.completed"]
    assert [one.partial_image_index for one in events[:3]] == [0, 1, 2]
    expected = pipe.generate("a red apple", seed=3)[0]
    assert picture(events[-1].b64_json).convert("RGB").tobytes() == expected.tobytes()
    white = Image.new("RGB", (32, 24), "white")
    first = picture(events[0].b64_json).convert("RGB")
    assert first.crop((0, 8, 32, 32)).tobytes() == white.tobytes()
    # what is shown first is what comes in the end, but for the edge where the decoder sees the next row
    assert first.crop((0, 0, 32, 4)).tobytes() != white.crop((0, 0, 32, 4)).tobytes()


def post_and_leave(address: str, path: str, body: object, begun: threading.Event) -> None:
    """Send a request, and hang up when the work on it has begun."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + data)
        assert begun.wait(120)


def test_who_hangs_up_is_cancelled_within_a_few_tokens(address, monkeypatch):
    slowed = Slowed(monkeypatch, 0.3)
    for stream in (False, True):
        slowed.begun.clear()
        post_and_leave(address, "/v1/images/generations", {"prompt": "cat", "stream": stream}, slowed.begun)
        left = slowed.steps
        late = time.monotonic() + 60
        while metric(address, 'mmwudao_waiting{queue="drawings"}') and time.monotonic() < late:
            time.sleep(0.01)
        time.sleep(0.5)
        assert slowed.steps <= left + 4  # of 16
    # and the service goes on
    monkeypatch.undo()
    assert CLIENT.post(f"{address}/v1/images/generations", json={"prompt": "cat"}).status_code == 200


def test_a_full_queue_is_a_429_at_once_also_for_a_stream(address, monkeypatch):
    slowed = Slowed(monkeypatch, 0)
    slowed.go.clear()  # what was accepted is not done before the others are answered
    body = {"prompt": "cat", "n": 8, "seed": 1}
    accepted: list[httpx2.Response] = []
    thread = threading.Thread(
        target=lambda: accepted.append(CLIENT.post(f"{address}/v1/images/generations", json=body))
    )
    thread.start()
    assert slowed.begun.wait(120)
    for stream in (False, True):
        answer = CLIENT.post(f"{address}/v1/images/generations", json={"prompt": "cat", "stream": stream})
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
    slowed.go.set()
    thread.join()
    assert accepted[0].status_code == 200


def test_a_deadline_is_kept(served, monkeypatch):
    Slowed(monkeypatch, 0.1)
    with running(served, ServiceConfig(drawing_deadline=0.3)) as url:
        answer = CLIENT.post(f"{url}/v1/images/generations", json={"prompt": "cat"})
        assert answer.status_code == 504
        assert answer.json()["error"]["type"] == "timeout_error"
        answer = CLIENT.post(f"{url}/v1/images/generations", json={"prompt": "cat", "stream": True})
        assert answer.status_code == 200
        assert "event: error" in answer.text
        assert "not done within 0.3 s" in answer.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "empty prompt"),
        ({"prompt": "x" * 1001}, "at most 1000"),
        ({"n": 0}, "n must be at least 1"),
        ({"n": 9}, "at most 8 pictures"),
        ({"size": "1024x1024"}, "auto, 32x32"),
        ({"style": "cubism"}, "unknown style"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**62}, "seed"),
        ({"response_format": "url"}, "response_format"),
        ({"partial_images": 4}, "partial_images"),
        ({"hue": 1}, "hue"),
    ],
)
def test_what_cannot_be_drawn_is_a_400(address, change, message):
    answer = CLIENT.post(f"{address}/v1/images/generations", json={"prompt": "cat"} | change)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


# captions, rerank


def test_captions_are_the_pipelines(address, pipe):
    images = [data_uri(png("red")), {"image": data_uri(png("navy"))}]
    expected = pipe.caption([Image.new("RGB", (16, 16), colour) for colour in ("red", "navy")], "de")
    answer = CLIENT.post(f"{address}/v1/captions", json={"images": images, "language": "de"}).json()
    assert [one["caption"] for one in answer["data"]] == expected
    answer = CLIENT.post(f"{address}/v1/captions", json={"images": images}).json()
    assert answer["data"][0]["language"] == "zh"
    for body, message in (
        ({"images": images, "language": "tlh"}, "describes in"),
        ({"images": []}, "images"),
        ({"images": images * 9}, "at most 16"),
        ({"images": ["red"]}, "data URI"),
    ):
        answer = CLIENT.post(f"{address}/v1/captions", json=body)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]


def test_who_hangs_up_gets_no_caption(address, monkeypatch):
    begun, steps = threading.Event(), []

    def slow(*arguments, on_step, **options):
        def count():
            steps.append(time.monotonic())
            begun.set()
            time.sleep(0.1)
            on_step()

        return describe(*arguments, on_step=count, **options)

    monkeypatch.setattr("mmwudao.tasks.describe", slow)
    images = [data_uri(png("red"))] * 16
    post_and_leave(address, "/v1/captions", {"images": images}, begun)
    late = time.monotonic() + 60
    while metric(address, 'mmwudao_waiting{queue="tasks"}') and time.monotonic() < late:
        time.sleep(0.01)
    left = len(steps)
    time.sleep(0.5)
    assert len(steps) <= left + 2
    monkeypatch.undo()
    answer = CLIENT.post(f"{address}/v1/captions", json={"images": images[:1]})
    assert answer.status_code == 200


def test_rerank_by_towers_and_by_captions(address, pipe):
    documents = [data_uri(png(colour)) for colour in ("red", "blue", "white")]
    answer = CLIENT.post(f"{address}/v1/rerank", json={"query": "something blue", "documents": documents, "top_n": 2})
    results = answer.json()["results"]
    assert len(results) == 2
    assert results[0]["index"] == 1
    assert results[0]["relevance_score"] == pytest.approx(1, abs=1e-3)
    body = {"query": "something blue", "documents": documents, "by": "caption"}
    scores = pipe.rerank("something blue", [Image.new("RGB", (16, 16), one) for one in ("red", "blue", "white")])
    results = CLIENT.post(f"{address}/v1/rerank", json=body).json()["results"]
    assert [one["relevance_score"] for one in results] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    refused = CLIENT.post(f"{address}/v1/rerank", json=body | {"by": "both"})
    assert refused.status_code == 400
    assert "has no towers" in refused.json()["error"]["message"]


def test_both_judges_where_the_model_has_towers(tiny_model_dir):
    served = tiny_served(tiny_model_dir)
    assert isinstance(served.generator, LocalGenerator)
    pipe = served.generator.pipeline
    pipe.config = replace(pipe.config, parts={**pipe.config.parts, "towers": Part("towers", "")})
    pipe.towers = ColourTowers().eval()
    documents = [data_uri(png(colour)) for colour in ("red", "blue")]
    with running(served) as url:
        body = {"query": "blue", "documents": documents, "by": "both"}
        results = CLIENT.post(f"{url}/v1/rerank", json=body).json()["results"]
    expected = pipe.rerank("blue", [Image.new("RGB", (16, 16), one) for one in ("red", "blue")], "both")
    by_index = {one["index"]: one["relevance_score"] for one in results}
    torch.testing.assert_close([by_index[0], by_index[1]], expected, atol=1e-4, rtol=0)


def test_the_stream_is_server_sent_events(address):
    answer = CLIENT.post(f"{address}/v1/images/generations", json={"prompt": "cat", "stream": True, "n": 2})
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in answer.text.split("\n\n") if block and not block.startswith(":")]
    records = [json.loads(block.partition("\ndata: ")[2]) for block in blocks]
    assert [(one["type"], one["index"]) for one in records] == [("image_generation.completed", k) for k in (0, 1)]
