"""Vectors a second of `mmwudao serve` against the bare forward pass, and what becomes of it at several times the load.

    python -m bench.load.serve_load [--towers FOLDER] [--kind image] [--inputs 1] [--clients 32] [--seconds 20]
        [--factor 10] [--limit NAME=NUMBER ...]

Without --towers, our default architecture with random weights. Three measurements:
* bare: the towers alone on full batches of what the service would batch, already decoded and in memory. Its speed is
  that of all threads, its CPU time that of one, which never waits for another;
* load: `--clients` connections, each sending its next request when it has the answer to the last;
* overload: `--factor` times as many for `--overload-seconds`; a refused client (429) comes back when its Retry-After
  says, as OpenAI's does, or after `--impatient` seconds.

The clients run on the same cores as the server, so `ratio` (vectors a second, of those of bare) also pays for them:
`client_share` is their part of all CPU time. `cpu_ratio` leaves them out: the CPU time that bare takes for a request's
inputs, of what the server takes. With pictures, `cpu_ratio_decoding` counts their decoding with bare. Where all cores
are busy these two say what is lost, and a busy machine beside does not change them much.
Memory is the server's resident set, sampled each second: `rss_growth_mib` is the mean of the last quarter less that of
the second. `failed` counts every answer but 200 and 429, and broken connections. Latencies are of answers with 200.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from data.reading import expand_shards, read_shard
from data.text import TextTokenizer
from mmwudao.service.settings import ServiceConfig
from retrieval.towers.base import Towers, load_towers, save_towers
from retrieval.towers.multiscale import MultiScaleConfig, MultiScaleTowers


@dataclass
class Outcome:
    """Of one measurement with clients."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)  # s, of answers with 200
    statuses: Counter[str] = field(default_factory=Counter)
    server_cpu: float = 0.0  # s
    client_cpu: float = 0.0
    rss: list[int] = field(default_factory=list)  # bytes

    def record(self, inputs: int) -> dict[str, Any]:
        answered = sorted(self.latencies)
        quarter = len(self.rss) // 4
        growth = (
            statistics.mean(self.rss[-quarter:]) - statistics.mean(self.rss[quarter : 2 * quarter]) if quarter else 0
        )
        answers = max(1, sum(self.statuses.values()))
        return {
            "vectors_per_s": round(len(answered) * inputs / self.seconds, 1),
            "median_ms": round(1000 * answered[len(answered) // 2], 1) if answered else None,
            "p99_ms": round(1000 * answered[int(0.99 * len(answered))], 1) if answered else None,
            "answered": len(answered),
            "refused": self.statuses["429"],
            "failed": sum(count for status, count in self.statuses.items() if status not in ("200", "429")),
            "server_cpu_ms": round(1000 * self.server_cpu / answers, 2),
            "client_cpu_ms": round(1000 * self.client_cpu / answers, 2),
            "rss_mib": round(max(self.rss) / 2**20) if self.rss else None,
            "rss_growth_mib": round(growth / 2**20, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--towers", type=Path)
    parser.add_argument("--shards", type=Path, default=Path("data/samples/emoji"))
    parser.add_argument("--kind", choices=["image", "text"], default="image")
    parser.add_argument("--inputs", type=int, default=1, help="texts or pictures in one request")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--factor", type=int, default=10)
    parser.add_argument("--overload-seconds", type=float, default=20.0)
    parser.add_argument("--impatient", type=float, help="seconds; default: what Retry-After says")
    parser.add_argument("--limit", action="append", default=[], metavar="NAME=NUMBER", help="of `mmwudao serve`")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.towers or save_towers(random_towers(arguments.shards), Path(temporary) / "towers")
        samples = [
            sample for shard in expand_shards(arguments.shards, "train") for sample in read_shard(shard, no_skips)
        ]
        if arguments.kind == "image":
            encoded = [(one.extension, base64.b64encode(one.require_image()).decode()) for one in samples]
            inputs = [f"data:image/{extension};base64,{data}" for extension, data in encoded]
        else:
            inputs = [caption.name for one in samples for caption in one.captions.values()]
        bare, bare_cpu, decode_cpu = bare_pass(load_towers(folder), arguments.kind, inputs, arguments.seconds / 2)
        requests = [
            json.dumps({"input": [inputs[(k + i) % len(inputs)] for i in range(arguments.inputs)],
                        "encoding_format": "base64"}).encode()
            for k in range(len(inputs))
        ]  # fmt: skip
        with serving(folder, arguments.limit) as (process, port):
            asyncio.run(load(process, port, requests, 8, min(3.0, arguments.seconds)))  # warm
            usual = asyncio.run(load(process, port, requests, arguments.clients, arguments.seconds))
            over = asyncio.run(
                load(
                    process,
                    port,
                    requests,
                    arguments.factor * arguments.clients,
                    arguments.overload_seconds,
                    arguments.impatient,
                )
            )
    rows = {"load": usual.record(arguments.inputs), "overload": over.record(arguments.inputs)}
    for name, outcome in (("load", usual), ("overload", over)):
        rows[name] |= shares(outcome, rows[name], arguments.inputs, bare, bare_cpu, decode_cpu)
    print(f"bare forward pass: {bare:.1f} vectors/s, {1000 * bare_cpu:.2f} CPU-ms a vector")
    if decode_cpu:
        print(f"decoding a picture: {1000 * decode_cpu:.2f} CPU-ms")
    for name in rows["load"]:
        print(f"{name:20} {rows['load'][name]!s:>10} {rows['overload'][name]!s:>10}")
    record = {
        "kind": arguments.kind,
        "bare_per_s": round(bare, 1),
        "bare_cpu_ms": round(1000 * bare_cpu, 2),
        "decode_cpu_ms": round(1000 * decode_cpu, 2),
        "p99_over_median": round(rows["load"]["p99_ms"] / rows["load"]["median_ms"], 2) if usual.latencies else None,
        **rows,
        "clients": arguments.clients,
        "factor": arguments.factor,
        "inputs": arguments.inputs,
        "limits": arguments.limit,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    print(json.dumps(record))


def shares(
    outcome: Outcome, record: dict[str, Any], inputs: int, bare: float, bare_cpu: float, decode_cpu: float
) -> dict[str, float | None]:
    """What the service gives of the bare forward pass, by the clock and by CPU time. Refused requests cost, too."""
    answered = max(1, len(outcome.latencies)) * inputs  # vectors
    server, clients = outcome.server_cpu, outcome.client_cpu
    return {
        "ratio": round(record["vectors_per_s"] / bare, 3),
        "cpu_ratio": round(answered * bare_cpu / server, 3),
        "cpu_ratio_decoding": round(answered * (bare_cpu + decode_cpu) / server, 3) if decode_cpu else None,
        "client_share": round(clients / (clients + server), 3),
    }


def no_skips(reason: str, name: str, error: Exception) -> None:
    raise error


def random_towers(shards: Path) -> Towers:
    text = TextTokenizer(shards / "text.model")
    torch.manual_seed(0)
    return MultiScaleTowers(MultiScaleConfig(num_text_pieces=text.vocab_size, text_hash=text.content_hash), text).eval()


def bare_pass(towers: Towers, kind: str, inputs: list[str], seconds: float) -> tuple[float, float, float]:
    """Vectors a second in all threads, CPU seconds a vector in one, and CPU seconds to decode a picture."""
    config, decoding = ServiceConfig(), 0.0
    if kind == "image":
        from data.images import open_image

        size = config.batch_images
        some = (inputs * (1 + size // len(inputs)))[:size]
        for _ in range(3):  # the first time is slow
            began = time.process_time()
            pictures = [open_image(base64.b64decode(one.partition(",")[2])) for one in some]
            pixels = torch.stack([towers.preprocess(picture) for picture in pictures])
            decoding = (time.process_time() - began) / size

        def one_pass() -> None:
            towers.encode_image(pixels, size)
    else:
        size = config.batch_texts
        texts = (inputs * (1 + size // len(inputs)))[:size]

        def one_pass() -> None:
            towers.encode_text(texts, size)

    def repeat(seconds: float) -> tuple[float, float]:
        """Seconds a vector, and CPU seconds."""
        one_pass()
        passes, started, busy = 0, time.perf_counter(), time.process_time()
        while not passes or time.perf_counter() - started < seconds:
            one_pass()
            passes += 1
        vectors = passes * size
        return (time.perf_counter() - started) / vectors, (time.process_time() - busy) / vectors

    wall, _ = repeat(seconds / 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _, cpu = repeat(seconds / 2)
    torch.set_num_threads(threads)
    return 1 / wall, cpu, decoding


@contextlib.contextmanager
def serving(folder: Path, limits: list[str]) -> Iterator[tuple[psutil.Process, int]]:
    """Our own server, see `listening`."""
    command = [sys.executable, "-m", "mmwudao", "serve", "--model", str(folder), "--device", "cpu"]
    command += [word for limit in limits for word in ("--limit", limit)]
    with listening(command) as ready:
        yield ready


@contextlib.contextmanager
def listening(command: list[str]) -> Iterator[tuple[psutil.Process, int]]:
    """The command in a process of its own, with a free `--port`, once it takes connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    null = subprocess.DEVNULL
    process = subprocess.Popen([*command, "--port", str(port)], stdout=null, stderr=null)
    try:
        late = time.monotonic() + 600
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > late:
                    raise SystemExit("error: the server did not start") from None
                time.sleep(0.1)
        yield psutil.Process(process.pid), port
    finally:
        process.terminate()
        process.wait(60)


async def load(
    process: psutil.Process,
    port: int,
    bodies: list[bytes],
    clients: int,
    seconds: float,
    impatient: float | None = None,
) -> Outcome:
    """What `clients` connections get in `seconds`."""
    outcome = Outcome()
    started, server, client = time.perf_counter(), sum(process.cpu_times()[:2]), time.process_time()
    end = started + seconds
    visitors = [asyncio.create_task(visit(port, bodies, k, end, outcome, impatient)) for k in range(clients)]
    while (left := end - time.perf_counter()) > 0:
        outcome.rss.append(process.memory_info().rss)
        await asyncio.sleep(min(1.0, left))
    await asyncio.gather(*visitors)
    outcome.seconds = time.perf_counter() - started
    outcome.server_cpu = sum(process.cpu_times()[:2]) - server
    outcome.client_cpu = time.process_time() - client
    return outcome


async def visit(port: int, bodies: list[bytes], k: int, end: float, outcome: Outcome, impatient: float | None) -> None:
    """One client: a connection that is kept, one request after the other. As little HTTP as will do."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < end:
        body = bodies[k % len(bodies)]
        k += 7
        head = (
            "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        started = time.perf_counter()
        try:
            writer.write(head.encode() + body)
            await writer.drain()
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            status = answer[9:12].decode()
            await reader.readexactly(int(answer.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            outcome.statuses[type(error).__name__] += 1
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            continue
        outcome.statuses[status] += 1
        if status == "200":
            outcome.latencies.append(time.perf_counter() - started)
        else:
            told = answer.partition(b"retry-after: ")[2].partition(b"\r\n")[0]
            wait = float(told or 1) if impatient is None else impatient
            await asyncio.sleep(max(0.0, min(wait, end - time.perf_counter())))
    writer.close()


if __name__ == "__main__":
    main()
