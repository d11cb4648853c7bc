"""CPU time of a request of one text beyond the tower's own: `mmwudao serve` beside infinity-emb's server.

    python -m bench.load.beside_infinity [--infinity PATH/bin/infinity_emb] [--clients 1 32] [--seconds 5] [--rounds 3]

Both serve /v1/embeddings to the same client, one text a request, base64, one thread for the tower (OMP_NUM_THREADS=1),
in turns. Ours has the shipped towers; infinity a BERT of the same width, depth and number of pieces with random weights
and pieces made of the same texts. Each tower alone is measured in this process: CPU time a text in full batches of the
service for many clients, one by one for a single client. What a request takes beyond it is HTTP, JSON, queues, waking
threads, and that batches are not full. Without infinity-emb (`pip install "infinity-emb[server,torch]"`, in an
environment of its own: it wants older libraries) ours is measured alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.load.serve_load import Outcome, listening, load, no_skips, serving
from data.reading import expand_shards, read_shard
from mmwudao.service.settings import ServiceConfig
from retrieval.towers.base import load_towers

TOWERS = Path("mmwudao/models/emoji/towers")
SHAPE = {"hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 768}
PIECES = 8000
Encode = Callable[[list[str]], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--infinity", default=shutil.which("infinity_emb"), help="its program")
    parser.add_argument("--shards", type=Path, default=Path("data/samples/emoji"))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    shards = expand_shards(arguments.shards, "train")
    texts = [
        caption.name for shard in shards for one in read_shard(shard, no_skips) for caption in one.captions.values()
    ]
    towers, full = load_towers(TOWERS), ServiceConfig().batch_texts
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        encoders: dict[str, Encode] = {"mmwudao": lambda some: towers.encode_text(some, full)}
        servers = {"mmwudao": stack.enter_context(serving(TOWERS, []))}
        if arguments.infinity is None:
            print("infinity-emb is not installed: mmwudao alone")
        else:
            encoders["infinity"] = make_bert(Path(temporary) / "bert", texts)
            servers["infinity"] = stack.enter_context(infinity(arguments.infinity, Path(temporary) / "bert"))
        for clients in arguments.clients:
            batch = 1 if clients == 1 else full
            alone = {name: cpu_alone(encode, texts, batch) for name, encode in encoders.items()}
            measured = take_turns(servers, texts, clients, arguments.seconds, arguments.rounds)
            rows += [row(name, clients, alone[name], outcomes) for name, outcomes in measured.items()]
    print(f"{'server':10} {'clients':>7} {'tower':>7} {'request':>8} {'beyond':>7} {'texts/s':>8} {'median ms':>9}")
    for one in rows:
        print(f"{one['server']:10} {one['clients']:7} {one['tower_cpu_ms']:7.3f} {one['request_cpu_ms']:8.3f} "
              f"{one['beyond_cpu_ms']:7.3f} {one['texts_per_s']:8.0f} {one['median_ms']:9.2f}")  # fmt: skip
    print(json.dumps({"rows": rows, "cores": os.cpu_count(), "load": os.getloadavg()}))


def row(server: str, clients: int, alone: float, outcomes: list[Outcome]) -> dict[str, Any]:
    """One line of the table, in CPU-ms; the medians of the rounds."""
    records = [outcome.record(1) for outcome in outcomes]
    request = statistics.median(1000 * one.server_cpu / len(one.latencies) for one in outcomes)
    return {
        "server": server,
        "clients": clients,
        "tower_cpu_ms": round(1000 * alone, 3),
        "request_cpu_ms": round(request, 3),
        "beyond_cpu_ms": round(request - 1000 * alone, 3),
        "texts_per_s": statistics.median(one["vectors_per_s"] for one in records),
        "median_ms": statistics.median(one["median_ms"] for one in records),
        "failed": sum(one["failed"] + one["refused"] for one in records),
    }


def take_turns(
    servers: dict[str, tuple[psutil.Process, int]], texts: list[str], clients: int, seconds: float, rounds: int
) -> dict[str, list[Outcome]]:
    """What the clients get of each server, `rounds` times, one after the other."""
    bodies = [json.dumps({"input": [text], "model": "towers", "encoding_format": "base64"}).encode() for text in texts]
    found: dict[str, list[Outcome]] = {name: [] for name in servers}
    for number in range(rounds + 1):
        for name, (process, port) in servers.items():
            outcome = asyncio.run(load(process, port, bodies, clients, seconds if number else 1.0))
            assert outcome.latencies, f"{name} answered nothing: {outcome.statuses}"
            if number:  # the first time is slow
                found[name].append(outcome)
    return found


def cpu_alone(encode: Encode, texts: list[str], batch: int, seconds: float = 2.0) -> float:
    """CPU seconds a text of the tower alone, the tokenizer included, in one thread; the least of three."""

    def once() -> float:
        began, until, done = time.process_time(), time.perf_counter() + seconds, 0
        while not done or time.perf_counter() < until:
            start = done % (len(texts) - batch)
            encode(texts[start : start + batch])
            done += batch
        return (time.process_time() - began) / done

    encode(texts[:batch])
    return min(once() for _ in range(3))


def make_bert(folder: Path, texts: list[str]) -> Encode:
    """A folder with a random BERT of the shipped text tower's shape, and how it makes vectors of texts."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel

    transformers: Any = importlib.import_module("transformers")  # its types do not tell of every tokenizer

    torch.manual_seed(0)
    folder.mkdir()
    pieces = BertWordPieceTokenizer()
    pieces.train_from_iterator(texts, vocab_size=PIECES, show_progress=False)
    pieces.save_model(str(folder))
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), model_max_length=32)
    tokenizer.save_pretrained(folder)
    shape: dict[str, Any] = {"vocab_size": PIECES, **SHAPE}
    model = BertModel(BertConfig(**shape)).eval()
    model.save_pretrained(folder)

    @torch.inference_mode()
    def encode(some: list[str]) -> Any:
        tokens = tokenizer(some, padding=True, truncation=True, return_tensors="pt")
        states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    return encode


@contextlib.contextmanager
def infinity(program: str, folder: Path) -> Iterator[tuple[psutil.Process, int]]:
    """infinity-emb's server, see `listening`."""
    options = ["--engine", "torch", "--device", "cpu", "--dtype", "float32", "--no-bettertransformer"]
    options += ["--no-model-warmup", "--batch-size", str(ServiceConfig().batch_texts), "--log-level", "error"]
    options += ["--served-model-name", "towers", "--url-prefix", "/v1", "--host", "127.0.0.1"]
    os.environ |= {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "HF_HUB_OFFLINE": "1"}
    with listening([program, "v2", "--model-id", str(folder), *options]) as ready:
        yield ready


if __name__ == "__main__":
    main()
