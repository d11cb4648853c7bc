"""Pictures behind URLs: only public addresses, resolved once, capped in size and time."""

from __future__ import annotations

import asyncio
import socket

import httpcore2
import pytest

from mmwudao.service.errors import BadInput, TooLarge
from mmwudao.service.fetching import PublicBackend, fetch, is_public
from mmwudao.service.queues import Served
from mmwudao.service.settings import ServiceConfig
from tests.helpers.http import CLIENT
from tests.helpers.service_server import running
from tests.helpers.tiny_towers import ColourTowers


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.0.0.1",
            "192.168.0.1",
            "172.16.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *("255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "2002:7f00:1::"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "::127.0.0.1", "192.0.2.1", "198.18.0.1", "2001:db8::1", "x", ""),
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_addresses_that_are_public(address):
    assert is_public(address)


class Answers(httpcore2.AsyncMockBackend):
    """Every connection gets the next response."""

    def __init__(self, *responses: bytes) -> None:
        super().__init__([])
        self.rest = list(responses)
        self.asked: list[tuple[str, int]] = []

    async def connect_tcp(self, host, port, *arguments, **options):
        self.asked.append((host, port))
        return httpcore2.AsyncMockStream([self.rest.pop(0)])


def get(url, backend, max_bytes=100, seconds=5.0):
    return asyncio.run(fetch(url, max_bytes, seconds, backend))


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"


def redirect(where: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {where}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


def test_fetching_follows_a_few_redirects():
    assert get("http://a.example/x", Answers(OK)) == b"hello"
    backend = Answers(redirect("/y"), redirect("http://b.example/z"), OK)
    assert get("http://a.example/x", backend) == b"hello"
    assert [host for host, _ in backend.asked] == ["a.example", "a.example", "b.example"]
    with pytest.raises(BadInput, match="more than 3 redirects"):
        get("http://a.example/", Answers(*[redirect("/")] * 4))


@pytest.mark.parametrize(
    ("url", "response", "error"),
    [
        ("http://a.example/", OK.replace(b"200", b"404"), BadInput),
        ("http://a.example/", b"nonsense", BadInput),
        ("http://a.example/", b"HTTP/1.1 200 OK\r\nContent-Length: 101\r\n\r\n" + b"x" * 101, TooLarge),
        ("http://a.example/", redirect("file:///etc/passwd"), BadInput),
        ("http://a.example/", redirect("ftp://b.example/"), BadInput),
        ("http://user:password@a.example/", OK, BadInput),
        ("http://a.example:x/", OK, BadInput),
        ("http://a.example:99999/", OK, BadInput),
        ("http:///x", OK, BadInput),
        ("http://[::1", OK, BadInput),
        ("http://ä.example/", OK, BadInput),
        ("http://a.example/\r\nX: y", OK, BadInput),
        ("gopher://a.example/", OK, BadInput),
    ],
)
def test_what_cannot_be_fetched(url, response, error):
    with pytest.raises(error) as caught:
        get(url, Answers(response))
    assert "\n" not in str(caught.value)


def test_a_name_is_resolved_once_and_every_address_must_be_public():
    asked = []

    def resolving(*addresses):
        async def resolve(host, port):
            asked.append(host)
            return list(addresses)

        return PublicBackend(resolve)

    for addresses in (("127.0.0.1",), ("1.1.1.1", "10.0.0.1"), ()):
        with pytest.raises(BadInput, match="not on the public internet"):
            get("http://rebind.example/", resolving(*addresses))
    assert asked == ["rebind.example"] * 3

    async def unknown(host, port):
        raise socket.gaierror

    with pytest.raises(BadInput, match="cannot be found"):
        get("http://no.example/", PublicBackend(unknown))


def test_the_address_that_was_checked_is_the_one_connected_to():
    async def resolve(host, port):
        return ["1.1.1.1"]

    wire = Answers(OK)
    assert get("http://a.example:8080/", PublicBackend(resolve, wire)) == b"hello"
    assert wire.asked == [("1.1.1.1", 8080)]


def test_a_redirect_inwards_is_refused():
    async def resolve(host, port):
        return ["1.1.1.1"] if host == "a.example" else [host]

    backend = PublicBackend(resolve, Answers(redirect("http://169.254.169.254/latest")))
    with pytest.raises(BadInput, match="not on the public internet"):
        get("http://a.example/", backend)


def test_a_slow_host_is_left_behind():
    class Slow(httpcore2.AsyncMockBackend):
        async def connect_tcp(self, *arguments, **options):
            await asyncio.sleep(30)

    with pytest.raises(BadInput, match="within 0.1 s"):
        get("http://a.example/", Slow([]), seconds=0.1)


def test_the_service_fetches_only_if_allowed_and_never_from_this_machine():
    with running(Served("tiny", ColourTowers().eval()), ServiceConfig(allow_urls=True)) as url:
        for inner in (f"{url}/healthz", "http://localhost/", "http://[::1]/", "http://169.254.169.254/"):
            answer = CLIENT.post(f"{url}/v1/embeddings", json={"input": {"image": inner}})
            assert answer.status_code == 400
            assert "not on the public internet" in answer.json()["error"]["message"]
        # a bare string is a text, whatever it looks like
        assert CLIENT.post(f"{url}/v1/embeddings", json={"input": "http://localhost/"}).status_code == 200
