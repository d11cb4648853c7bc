"""Bearer keys, and the addresses that a service without keys may listen on."""

from __future__ import annotations

import hmac
import ipaddress
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

KEYS_VARIABLE = "MMWUDAO_KEYS"
SHORTEST_KEY = 16  # characters


def read_keys(path: Path | str | None) -> tuple[str, ...]:
    """Keys of a file, one a line ('#' begins a comment), and of the environment variable, separated by spaces.

    Raises `ValueError` for a file that is missing or holds no key, and for a key that is short or not plain ASCII.
    """
    keys = os.environ.get(KEYS_VARIABLE, "").split()
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no file of keys at {path}")
        try:
            lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="ascii").splitlines()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: keys are plain ASCII, one a line") from error
        if not any(lines):
            raise ValueError(f"{path} holds no key: write one a line")
        keys += filter(None, lines)
    for number, key in enumerate(keys, 1):
        if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"key {number} must have at least {SHORTEST_KEY} printable ASCII characters and no space")
    return tuple(keys)


class KeyRing:
    """The known keys, as digests: all that is compared has the same length."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accepts(self, authorization: bytes) -> bool:
        """Whether the value of an `Authorization` header is `Bearer` and a known key, in time that reveals nothing."""
        scheme, _, given = authorization.partition(b" ")
        digest = sha256(given.strip()).digest()
        # compare with all keys: an early end would reveal which one matched
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(found)


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is this machine and nothing else."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_binding(host: str, keys: Sequence[str]) -> None:
    """Raises `ValueError` for an address that others can reach, unless there are keys."""
    if not keys and not is_loopback(host):
        raise ValueError(
            f"listening on {host} lets others in: give keys (--keys-file, or {KEYS_VARIABLE}), or keep to 127.0.0.1"
        )
