"""CPU time that the server takes to refuse a request, beside one that it answers.

    python -m bench.load.refusal_cost [--requests 2000] [--rounds 3]

`mmwudao serve` with a key and the shipped towers; one client on one connection, with a small body and with one of 1 or
3 MB, which it sends to its end whatever the answer is: the server takes the bytes off the connection and drops them.
The least of the rounds counts: on a busy machine caches are cold. CPU time comes in ticks of 10 ms: ask often.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from pathlib import Path

import psutil

from bench.load.serve_load import serving

TOWERS = Path("mmwudao/models/emoji/towers")
KEY = "a-key-of-16-characters"
MEGABYTE = 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="of each kind in a round; a tenth with 1 MB")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ.update(MMWUDAO_KEYS=KEY, OMP_NUM_THREADS="1")
    small = json.dumps({"input": ["a red apple"], "encoding_format": "base64"}).encode()
    large = json.dumps({"input": ["a red apple"], "user": "x" * MEGABYTE}).encode()
    kinds = {
        "answered": (200, post("/v1/embeddings", small)),
        "wrong key": (401, post("/v1/embeddings", small, "another-key-of-16-characters")),
        "wrong key, 1 MB": (401, post("/v1/embeddings", large, "another-key-of-16-characters")),
        "no such part": (404, post("/v1/search", small)),
        "no such part, 1 MB": (404, post("/v1/search", large)),
        "too large, 3 MB": (413, post("/v1/embeddings", large * 3)),
    }
    milliseconds: dict[str, float] = {}
    with serving(TOWERS, [f"max_body={2 * MEGABYTE}"]) as (process, port):
        for number in range(arguments.rounds):
            for name, (status, request) in kinds.items():
                count = arguments.requests // (10 if len(request) > MEGABYTE else 1)
                found = 1000 * cpu_of(process, port, request, status, count if number else 20)
                milliseconds[name] = min(found, milliseconds.get(name, found))
    for name, each in milliseconds.items():
        print(f"{name:20} {each:7.3f} CPU-ms")
    print(
        json.dumps({"cpu_ms": {name: round(each, 3) for name, each in milliseconds.items()}, "load": os.getloadavg()})
    )


def post(path: str, body: bytes, key: str = KEY) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def cpu_of(process: psutil.Process, port: int, request: bytes, status: int, count: int) -> float:
    """CPU seconds of the server a request, of `count` on one connection. Asserts that each gets `status`."""
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rb") as answers:
        began = sum(process.cpu_times()[:2])
        for _ in range(count):
            connection.sendall(request)
            first = answers.readline()
            assert first.split()[1] == str(status).encode(), first
            length = 0
            while (line := answers.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            answers.read(length)
        return (sum(process.cpu_times()[:2]) - began) / count


if __name__ == "__main__":
    main()
