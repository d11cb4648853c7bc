"""Pictures from the web, only where the operator allows it: public addresses only, and capped in size and time."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore2

from mmwudao.service.errors import BadInput, TooLarge

REDIRECTS = 3
REDIRECT_STATUSES = (301, 302, 303, 307, 308)
NAT64 = ipaddress.ip_network("64:ff9b::/96")
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is given out; RFC 4291, section 2.4

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a name."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet; an address inside another (NAT64, 6to4, ...) counts."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if parsed in NAT64:
            inner = ipaddress.IPv4Address(parsed.packed[-4:])
        if inner is not None:
            return is_public(str(inner))
        if parsed not in GLOBAL_UNICAST:
            return False
    return parsed.is_global and not parsed.is_multicast


class PublicBackend(httpcore2.AsyncNetworkBackend):
    """Connects to public addresses only. A name is resolved once, so the address used is the one that was checked."""

    def __init__(self, resolve: Resolve = resolve, backend: httpcore2.AsyncNetworkBackend | None = None) -> None:
        self._resolve = resolve
        self._backend = backend or httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise BadInput("the picture's host cannot be found") from error
        if not addresses or not all(map(is_public, addresses)):
            raise BadInput("the picture's host is not on the public internet")
        return await self._backend.connect_tcp(addresses[0], port, timeout, local_address, socket_options)

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore2.AsyncNetworkStream:
        raise BadInput("the picture's host is not on the public internet")


async def fetch(
    url: str, max_bytes: int, seconds: float, backend: httpcore2.AsyncNetworkBackend | None = None
) -> bytes:
    """The body behind an http(s) URL, after at most `REDIRECTS` redirects, each checked as the first address is.

    Raises `BadInput`, `TooLarge`. No proxy of the environment is used, no cookie or key is sent.
    """
    try:
        async with (
            asyncio.timeout(seconds),
            httpcore2.AsyncConnectionPool(network_backend=backend or PublicBackend(), retries=0) as pool,
        ):
            for _ in range(REDIRECTS + 1):
                body, location = await _get(pool, _checked(url), max_bytes)
                if location is None:
                    return body
                url = urljoin(url, location)
    except TimeoutError as error:
        raise BadInput(f"the picture did not arrive within {seconds:g} s") from error
    except (OSError, httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException) as error:
        raise BadInput("the picture could not be fetched") from error
    raise BadInput(f"the picture is behind more than {REDIRECTS} redirects")


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or not url.isascii() or any(character.isspace() for character in url):
        raise BadInput("a picture's address must be an http:// or https:// URL of ASCII characters")
    if "@" in parts.netloc:
        raise BadInput("a picture's address must not hold a name and password")
    return url


async def _get(pool: httpcore2.AsyncConnectionPool, url: str, max_bytes: int) -> tuple[bytes, str | None]:
    """The body, or where a redirect leads."""
    headers = [("Accept", "image/*"), ("Accept-Encoding", "identity"), ("User-Agent", "mmwudao")]
    async with pool.stream("GET", url, headers=headers) as response:
        if response.status in REDIRECT_STATUSES:
            location = next((value for name, value in response.headers if name.lower() == b"location"), b"")
            return b"", location.decode("latin-1")
        if response.status != 200:
            raise BadInput(f"the picture's host answered with status {response.status}")
        body = bytearray()
        async for chunk in response.aiter_stream():
            body += chunk
            if len(body) > max_bytes:
                raise TooLarge(f"a fetched picture may have {max_bytes} bytes")
        return bytes(body), None
