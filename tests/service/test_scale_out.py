"""The service on Ray Serve: the answers of one server, by replicas, of which one may be lost."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import httpx2
import numpy
import openai
import pytest
import torch

from mmwudao.cli.app import run
from mmwudao.service.opening import open_served
from mmwudao.service.settings import ServeSettings, ServiceConfig
from retrieval.towers.base import save_towers
from tests.helpers.http import CLIENT
from tests.helpers.service_server import data_uri, png, running
from tests.helpers.tiny_towers import tiny_towers

ray = pytest.importorskip("ray")

from mmwudao.service.ray.deployments import build, share_limits  # noqa: E402

ROOT = Path(__file__).parents[2]
MODEL = "tiny"
KEY = "a-key-of-16-characters"
ROOM = 256  # texts that wait at each replica of the towers
ASKED_ABOUT = [{"type": "text", "text": "red?"}, {"type": "image_url", "image_url": {"url": data_uri(png())}}]
ASKED = {"prompt": "红心", "n": 2, "seed": 3}


def wait_for(condition, what, seconds=120):
    late = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < late, what
        time.sleep(0.2)


# what is refused before anything is started


def test_bad_settings(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("MMWUDAO_KEYS", raising=False)
    towers = str(save_towers(tiny_towers(), tmp_path / "tower", torch.float32))
    settings = {"model": str(tiny_model_dir), "keyless": True}
    for changes, problem in (
        ({"keyless": False}, "give keys"),
        ({"keyless": "maybe"}, "keyless must be true or false"),
        ({"generator_replicas": 0}, "no towers .* give --towers"),
        ({"collection": "c"}, "no towers .* give --towers"),
        ({"model": "nothing"}, "no model 'nothing'"),
        ({"model": towers, "towers": towers}, "takes neither --towers nor --adapter"),
        ({"model": towers, "adapter": "style"}, "takes neither --towers nor --adapter"),
        ({"generator_replicas": 0, "towers": towers, "adapter": "style"}, "without one there is no --adapter"),
        ({"durable": "true"}, "give --collection"),
        ({"device": "cpu"}, "leave out --device"),
        ({"deadline": 0}, "deadline must be a number above 0"),
        ({"tower_replicas": 0}, "tower_replicas must be a whole number of at least 1"),
        ({"generator_replicas": -1}, "generator_replicas must be"),
        ({"cpus": "many"}, "cpus: .* valid number"),
        ({"replicas": 2}, "unknown option replicas"),
    ):
        with pytest.raises(ValueError, match=problem) as error:
            build(settings | changes)
        assert "\n" not in str(error.value)


def test_arguments_may_be_strings(tiny_model_dir, monkeypatch):
    monkeypatch.delenv("MMWUDAO_KEYS", raising=False)
    assert build({"model": str(tiny_model_dir), "keyless": "true", "tower_replicas": "2", "cpus": "0.5"}) is not None


def test_bad_commands_are_one_line(tiny_model_dir, monkeypatch, capsys):
    monkeypatch.delenv("MMWUDAO_KEYS", raising=False)
    command = ["serve", "--model", str(tiny_model_dir)]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        assert run([*command, "--ray", "local"]) == 2
        assert "pip install 'mmwudao[ray]'" in capsys.readouterr().err
    for options, problem in (
        (["--ray", "local", "--host", "0.0.0.0"], "give keys"),
        (["--ray", "local", "--device", "cpu"], "leave out --device"),
        (["--tower-replicas", "2"], "replicas are for --ray"),
    ):
        assert run([*command, *options]) == 2
        said = capsys.readouterr().err
        assert problem in said
        assert said.count("\n") == 1


def test_queues_are_bounded_by_what_is_behind_them():
    plain = ServiceConfig(waiting_drawings=64, waiting_tasks=32, max_pictures=10)
    for towers, generators, drawings, tasks in ((1, 1, 64, 32), (2, 1, 32, 16), (1, 3, 192, 96), (32, 1, 10, 1)):
        front, behind = share_limits(plain, ServeSettings(tower_replicas=towers, generator_replicas=generators))
        assert (front.waiting_drawings, front.waiting_tasks) == (drawings, tasks)
        assert (behind.waiting_drawings, behind.waiting_tasks) == (towers * drawings, towers * tasks)
        assert front.waiting_texts == plain.waiting_texts


# with Ray: a minute goes by until all its processes have started


def free_port():
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def options(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale-out")
    towers = save_towers(tiny_towers(), folder / "tower", torch.float32)
    return {"model": str(tiny_model_dir), "towers": str(towers), "collection": str(folder / "collection")}


@pytest.fixture(scope="module")
def address(options):
    """`mmwudao serve --ray` with two replicas of the towers, one of the generator, and a key."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_worker_niceness", "0")
        ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
        command = [sys.executable, "-m", "mmwudao", "serve", "--ray", "auto", "--tower-replicas", "2"]
        command += ["--cpus", "0.5", "--port", str(port), "--limit", f"waiting_texts={ROOM}"]
        command += [word for name, value in options.items() for word in (f"--{name}", value)]
        environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "MMWUDAO_KEYS": KEY}
        server = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(cast(Any, server.stderr)))
        reader.start()
        try:
            wait_for(lambda: not reader.is_alive() or any(line.startswith("serving") for line in said), "no start", 400)
            assert server.poll() is None, "".join(said)
            yield f"http://127.0.0.1:{port}"
            server.terminate()
            assert server.wait(60) == 0, "".join(said)
            with pytest.raises(httpx2.ConnectError):
                CLIENT.get(f"http://127.0.0.1:{port}/healthz")
        finally:
            server.kill()
            reader.join()
            ray.shutdown()


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def ask(address, path, body=None, key=KEY):
    headers = {"Authorization": f"Bearer {key}"}
    if body is None:
        return CLIENT.get(address + path, headers=headers)
    return CLIENT.post(address + path, headers=headers, json=body)


def busy_replicas(address, status=200):
    """The replicas that have answered requests for vectors so, by the metrics of the cluster."""
    counts = re.findall(r"^mmwudao_requests_total\{(.*)\} ", ask(address, "/metrics").text, re.MULTILINE)
    labels = [dict(re.findall(r'(\w+)="([^"]*)"', one)) for one in counts]
    return {one["replica"] for one in labels if (one["route"], one["status"]) == ("/v1/embeddings", str(status))}


@pytest.mark.slow
def test_answers_are_those_of_one_server(address, options):
    described = [{"id": f"item-{k}", "text": text} for k, text in enumerate(["red", "blue", "ein Apfel"])]
    asked = {
        "/v1/embeddings": {"input": ["a red apple", data_uri(png("blue"))]},
        "/v1/search": {"text": "red", "k": 3},
        "/v1/captions": {"images": [data_uri(png())], "language": "en"},
        "/v1/rerank": {"query": "red", "documents": [data_uri(png()), data_uri(png("blue"))], "by": "caption"},
        "/v1/items/item-1?vector=true": None,
        "/v1/items/nothing": None,
        "/v1/images/generations": {"prompt": ""},
        "/nowhere": None,
    }
    assert ask(address, "/v1/items", {"items": described}).json() == {"stored": 3}
    served = open_served(ServeSettings(**options, device="cpu"))
    with running(served, ServiceConfig(keys=(KEY,))) as alone:
        for path, body in asked.items():
            found, expected = ask(address, path, body), ask(alone, path, body)
            assert found.status_code == expected.status_code, found.text
            assert nearly(found.json(), expected.json()), path
        question = {"messages": [{"role": "user", "content": ASKED_ABOUT}]}
        told = [ask(url, "/v1/chat/completions", question).json()["choices"] for url in (address, alone)]
        assert told[0] == told[1]
        drawn, expected = (ask(url, "/v1/images/generations", ASKED).json()["data"] for url in (address, alone))
        assert [one["b64_json"] for one in drawn] == [one["b64_json"] for one in expected]
    served.close()
    cards = [ask(address, f"/v1/models/{MODEL}").json() for _ in range(16)]
    assert all(card == cards[0] for card in cards), "replicas differ"
    assert cards[0]["can"] == ["embed", "draw", "caption", "answer", "search"]
    refused = ask(address, "/v1/models", key="another-key-of-16-characters")
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


def nearly(found, expected):
    """Equal, but for the last bits of numbers."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(nearly(found[name], expected[name]) for name in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(nearly, found, expected))
    return found == pytest.approx(expected, abs=1e-4) if isinstance(expected, float) else found == expected


@pytest.mark.slow
def test_the_openai_client_and_both_replicas(address, client):
    towers = tiny_towers()

    def embed(k):
        return client.embeddings.create(model=MODEL, input=[f"text {k}"]).data[0].embedding

    with ThreadPoolExecutor(8) as pool:
        found = numpy.array(list(pool.map(embed, range(64))))
    expected = towers.encode_text([f"text {k}" for k in range(64)]).detach().numpy()
    numpy.testing.assert_allclose(found, expected, atol=1e-5)

    def both():
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(embed, range(16)))
        return len(busy_replicas(address)) == 2

    wait_for(both, "one replica does all the work")
    kinds = [
        event.type for event in client.images.generate(model=MODEL, prompt="红心", n=1, stream=True, partial_images=2)
    ]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert client.images.generate(model=MODEL, prompt="a red apple", n=2).size == "32x32"


@pytest.mark.slow
def test_overload_is_our_429_and_counted_for_the_cluster(address):
    body = {"input": [f"text {k}" for k in range(ROOM)]}
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: ask(address, "/v1/embeddings", body), range(48)))
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert answer.json()["error"]["code"] == "overloaded"
            assert int(answer.headers["Retry-After"]) >= 1
    wait_for(lambda: busy_replicas(address, 429), "not counted", 30)


@pytest.mark.slow
def test_a_replica_is_killed(address, client):
    """Requests go on: those that the lost replica had fail, and the client asks again."""
    patient = client.with_options(max_retries=5)
    names = [
        one["name"]
        for one in ray.util.list_named_actors(all_namespaces=True)
        if one["name"].startswith("SERVE_REPLICA::mmwudao#towers#")
    ]
    assert len(names) == 2
    stop, answered, problems = threading.Event(), [], []

    def go_on():
        while not stop.is_set():
            try:
                answered.append(patient.embeddings.create(model=MODEL, input="red").data[0].index)
            except openai.OpenAIError as error:
                problems.append(error)

    threads = [threading.Thread(target=go_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(answered) > 20, "no answers")
    ray.kill(ray.get_actor(names[0], namespace="serve"))
    killed = len(answered)
    wait_for(lambda: len(answered) > killed + 100, "no answers after the kill")
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems
    # another takes its place
    wait_for(lambda: ray.serve.status().applications["mmwudao"].status == "RUNNING", "not replaced", 400)
