"""Keys, binding, caps, overload, deadlines, logs, and an end in good order."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest

from mmwudao.cli.app import run
from mmwudao.service.errors import BadInput, ServiceError
from mmwudao.service.keys import KeyRing, check_binding, read_keys
from mmwudao.service.queues import Served
from mmwudao.service.server import configure_logging
from mmwudao.service.settings import ServeSettings, ServiceConfig
from tests.helpers.http import CLIENT
from tests.helpers.service_server import MemoryCollection, data_uri, png, running
from tests.helpers.tiny_towers import ColourTowers

KEYS = ("first-key-0123456789", "second-key-0123456789")


pytestmark = pytest.mark.usefixtures("loggers_as_they_were")


class SlowTowers(ColourTowers):
    """Waits until it is told to go on."""

    def __init__(self):
        super().__init__()
        self.go = threading.Event()
        self.texts: list[str] = []

    def tokenize(self, texts):
        self.texts += texts
        assert self.go.wait(120)
        return super().tokenize(texts)


# keys


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text(f"# of the shop\n{KEYS[0]}  # old\n\n")
    monkeypatch.setenv("MMWUDAO_KEYS", f" {KEYS[1]} ")
    assert read_keys(path) == (KEYS[1], KEYS[0])
    monkeypatch.delenv("MMWUDAO_KEYS")
    assert read_keys(None) == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no key"),
        (b"# x\n", "holds no key"),
        (b"short\n", "at least 16"),
        (b"two words 0123456789\n", "no space"),
        ("schlüssel-0123456789".encode(), "ASCII"),
    ],
)
def test_bad_files_of_keys_are_refused(tmp_path, content, message):
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_keys(path)
    assert "0123456789" not in str(error.value), "a key is not shown"
    with pytest.raises(ValueError, match="no file of keys"):
        read_keys(tmp_path / "absent")


def test_a_key_ring_knows_its_keys_and_no_other():
    ring = KeyRing(KEYS)
    assert all(ring.accepts(f"Bearer {key}".encode()) for key in KEYS)
    assert ring.accepts(f"bearer  {KEYS[0]}".encode())
    for wrong in ("", "Bearer", "Bearer ", KEYS[0], f"Basic {KEYS[0]}", f"Bearer {KEYS[0]}x", f"Bearer {KEYS[0][:-1]}"):
        assert not ring.accepts(wrong.encode())
    assert not ring.accepts(b"Bearer \xff\xfe")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.com", ""])
def test_listening_wider_needs_a_key(host):
    with pytest.raises(ValueError, match="give keys"):
        check_binding(host, ())
    check_binding(host, KEYS)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_needs_none(host):
    check_binding(host, ())


def test_the_command_refuses_before_it_loads_anything(capsys, tmp_path):
    assert run(["serve", "--model", "no-such-model", "--host", "0.0.0.0"]) == 2
    assert "give keys" in capsys.readouterr().err
    assert run(["serve", "--keys-file", str(tmp_path / "absent")]) == 2
    assert run(["serve", "--model", "no-such-model"]) == 2
    assert "give a shipped name" in capsys.readouterr().err
    assert run(["serve", "--deadline", "0"]) == 2
    assert "deadline must be a number above 0" in capsys.readouterr().err


def test_only_a_known_key_gets_in():
    with running(Served("tiny", ColourTowers().eval()), ServiceConfig(keys=KEYS)) as url:
        body = {"input": "red"}
        for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": f"Basic {KEYS[0]}"}):
            for answer in (
                CLIENT.post(f"{url}/v1/embeddings", json=body, headers=headers),
                CLIENT.get(f"{url}/metrics", headers=headers),
                CLIENT.get(f"{url}/v1/nowhere", headers=headers),
            ):
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
        for key in KEYS:
            answer = CLIENT.post(f"{url}/v1/embeddings", json=body, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 200
        for path in ("healthz", "readyz", "docs", "openapi.json"):
            assert CLIENT.get(f"{url}/{path}").status_code == 200


def test_without_keys_a_foreign_host_name_is_refused():
    with running(Served("tiny", ColourTowers().eval())) as url:
        for host, status in (
            ("localhost", 200),
            ("127.0.0.1:1", 200),
            ("[::1]", 200),
            ("evil.example", 403),
            ("", 403),
        ):
            answer = CLIENT.post(f"{url}/v1/embeddings", json={"input": "red"}, headers={"Host": host})
            assert answer.status_code == status, host


# caps and overload


def test_limits_must_make_sense():
    with pytest.raises(ValueError, match="max_body must be a whole number of at least 1"):
        ServiceConfig(max_body=0)
    with pytest.raises(ValueError, match="waiting_texts must be at least 256"):
        ServiceConfig(waiting_texts=10)


def test_any_limit_is_given_by_its_name():
    config = ServeSettings(limit=["waiting_texts=4096", "window=0", "body_deadline=1.5"], max_requests=7).config(())
    assert (config.waiting_texts, config.window, config.body_deadline, config.max_requests) == (4096, 0.0, 1.5, 7)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("waiting_text=1", "unknown key waiting_text"),
        ("waiting_texts", "key=value"),
        ("waiting_texts=many", "a valid integer"),
        ("waiting_texts=2.5", "a valid integer"),
        ("waiting_texts=0", "at least 1"),
        ("body_deadline=.inf", "above 0"),
        ("window=-1", "at least 0"),
        ("max_inputs=5000", "waiting_texts must be at least 5000"),
        ("max_requests=5", "an option of its own"),
    ],
)
def test_a_limit_that_is_none_is_one_line(limit, message, capsys):
    assert run(["serve", "--limit", limit]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1


def test_the_page_of_the_routes_needs_nothing_from_elsewhere():
    with running(Served("tiny", ColourTowers().eval()), ServiceConfig(keys=KEYS)) as address:
        page = CLIENT.get(f"{address}/docs")
        assert page.status_code == 200
        parts = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert any(part.endswith(".js") for part in parts)
        for part in parts:
            assert part.startswith("/")
            assert CLIENT.get(f"{address}{part}").status_code == 200
        assert "://" not in page.text
        assert CLIENT.get(f"{address}/static-offline-docs/../v1/models").status_code == 401
        assert CLIENT.get(f"{address}/static-offline-docs/%2e%2e/__init__.py").status_code == 404


def test_a_collection_of_other_towers_is_refused():
    towers = ColourTowers()
    with pytest.raises(ValueError, match="holds vectors of 9 numbers"):
        Served("tiny", towers, collection=MemoryCollection(dim=9))
    with pytest.raises(ValueError, match="of other towers"):
        Served("tiny", towers, collection=MemoryCollection(model="abc"))
    with pytest.raises(ValueError, match="nothing to serve"):
        Served("tiny")


def test_overload_is_refused_at_once_and_what_was_accepted_is_answered():
    towers = SlowTowers().eval()
    config = ServiceConfig(max_inputs=1, waiting_texts=4, waiting_images=4)
    with running(Served("tiny", towers), config) as url, httpx2.Client(timeout=30) as client:
        answers: list[httpx2.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(CLIENT.post(f"{url}/v1/embeddings", json={"input": "red"})))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        while 'mmwudao_waiting{queue="texts"} 4.0' not in client.get(f"{url}/metrics").text:
            time.sleep(0.01)
        refused = client.post(f"{url}/v1/embeddings", json={"input": "red"})
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        # before anything of it is parsed
        json_kind = {"Content-Type": "application/json"}
        assert client.post(f"{url}/v1/embeddings", content=b'{"input": ', headers=json_kind).status_code == 429
        # pictures have a queue of their own
        assert client.post(f"{url}/v1/embeddings", json={"input": data_uri(png())}).status_code == 200
        assert client.post(f"{url}/v1/embeddings", files={"file": png()}).status_code == 200
        towers.go.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 4
        assert client.post(f"{url}/v1/embeddings", json={"input": "red"}).status_code == 200


def test_too_many_requests_and_too_many_bytes_at_a_time_are_refused():
    towers = SlowTowers().eval()
    config = ServiceConfig(max_requests=2, max_body=3000, max_bodies=5000)
    with running(Served("tiny", towers), config) as url, httpx2.Client(timeout=30) as client:
        waiting = threading.Thread(target=lambda: CLIENT.post(f"{url}/v1/embeddings", json={"input": "red " * 700}))
        waiting.start()
        while not towers.texts:
            time.sleep(0.01)
        answer = client.post(f"{url}/v1/embeddings", json={"input": "red " * 700})
        assert answer.status_code == 429
        assert "too much" in answer.json()["error"]["message"]
        other = threading.Thread(target=lambda: CLIENT.post(f"{url}/v1/embeddings", json={"input": "red"}))
        other.start()
        while "mmwudao_requests_in_flight 3.0" not in client.get(f"{url}/metrics").text:  # and this one
            time.sleep(0.01)
        answer = client.post(f"{url}/v1/embeddings", json={"input": "red"})
        assert answer.status_code == 429
        assert "2 requests" in answer.json()["error"]["message"]
        assert client.get(f"{url}/healthz").status_code == 200
        towers.go.set()
        waiting.join()
        other.join()
        assert client.post(f"{url}/v1/embeddings", json={"input": "red " * 700}).status_code == 200


def test_a_deadline_is_kept_and_makes_room():
    towers = SlowTowers().eval()
    with running(Served("tiny", towers), ServiceConfig(deadline=0.2)) as url:
        answer = CLIENT.post(f"{url}/v1/embeddings", json={"input": "red"})
        assert answer.status_code == 504
        assert answer.json()["error"]["type"] == "timeout_error"
        assert 'mmwudao_waiting{queue="texts"} 0.0' in CLIENT.get(f"{url}/metrics").text
        towers.go.set()
        assert CLIENT.post(f"{url}/v1/embeddings", json={"input": "red"}).status_code == 200


def test_a_body_that_does_not_arrive_is_not_waited_for():
    config = ServiceConfig(body_deadline=0.3)
    with running(Served("tiny", ColourTowers().eval()), config) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=120) as connection:
            head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert "mmwudao_requests_in_flight 1.0" in CLIENT.get(f"{url}/metrics").text  # this one


def test_a_mistake_of_ours_is_a_500_without_a_trace():
    class Broken(ColourTowers):
        def tokenize(self, texts):
            raise RuntimeError("secret details")

    with running(Served("tiny", Broken().eval())) as url:
        answer = CLIENT.post(f"{url}/v1/embeddings", json={"input": "red"})
        assert answer.status_code == 500
        assert answer.json()["error"] == {
            "message": "the server failed", "type": "server_error", "param": None, "code": None
        }  # fmt: skip
        line = 'mmwudao_requests_total{method="POST",route="/v1/embeddings",status="500"} 1.0'
        assert line in CLIENT.get(f"{url}/metrics").text


def test_paths_and_methods_that_are_not_there_are_openais_errors():
    with running(Served("tiny", ColourTowers().eval())) as url:
        for answer, status in ((CLIENT.get(f"{url}/v1/nowhere"), 404), (CLIENT.get(f"{url}/v1/embeddings"), 405)):
            assert answer.status_code == status
            assert answer.json()["error"]["type"] == "invalid_request_error"
        assert 'route="none"' in CLIENT.get(f"{url}/metrics").text


# logs


def test_logs_hold_no_prompt_unless_asked(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(logging.getLogger("httpx2"), "disabled", True)  # the client's own
    for asked in (False, True):
        caplog.clear()
        with running(Served("tiny", ColourTowers().eval()), ServiceConfig(log_prompts=asked)) as url:
            CLIENT.post(f"{url}/v1/embeddings", json={"input": "my secret red"})
            CLIENT.put(f"{url}/v1/items/my-secret-id", json={"text": "my secret red"})
        assert ("my secret red" in caplog.text) == asked
        assert "my-secret-id" not in caplog.text
        assert "POST /v1/embeddings 200" in caplog.text


def test_loggers_that_quote_are_quiet():
    configure_logging(log_prompts=False)
    assert not logging.getLogger("retrieval.towers.multiscale").isEnabledFor(logging.WARNING)
    assert not logging.getLogger("mmwudao.loading.loaded").isEnabledFor(logging.WARNING)
    assert logging.getLogger("mmwudao.service.access").isEnabledFor(logging.WARNING)


def test_service_errors_are_one_line_with_a_status():
    error = BadInput("wrong", param="n")
    assert isinstance(error, ServiceError)
    assert (str(error), error.status_code, error.param) == ("wrong", 400, "n")


# the end


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_command_serves_and_finishes_what_it_accepted(tiny_model_dir):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mmwudao", "serve", "--model", str(tiny_model_dir), "--port", str(port)]
    root = Path(__file__).parents[2]
    process = subprocess.Popen([*command, "--device", "cpu"], cwd=root, stderr=subprocess.PIPE, text=True)
    try:
        url, late = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while True:
            try:
                if CLIENT.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx2.TransportError:
                pass
            assert process.poll() is None
            assert time.monotonic() < late
            time.sleep(0.1)
        body = {"prompt": "cat", "n": 10, "stream": True}
        with CLIENT.stream("POST", f"{url}/v1/images/generations", json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines) == ": accepted"
            process.send_signal(signal.SIGTERM)
            events = [json.loads(line[6:])["type"] for line in lines if line.startswith("data: ")]
        assert events == ["image_generation.completed"] * 10
        assert process.wait(120) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
