"""Pictures a second of `embed` over shards against the bare forward pass on the same pictures in memory.

    python bench/speed/embed_speed.py [--shards data/samples/emoji] [--towers FOLDER] [--repeat 4]

Without --towers, our default architecture with random weights. Measured in turn, `--runs` times: the bare pass as it
comes, one batch after the other on all of PyTorch's threads; the same batches side by side, as `embed` encodes them;
and `embed_shards`, from tar files to Parquet. The JSON holds the medians, and CPU times of one picture, in which
threads that wait for each other count as busy. On cores that both share, `embed` cannot exceed
encode / (encode + read + decode) of the batches side by side.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from data.batches import cores, in_order
from data.images import open_image
from data.reading import expand_shards, read_shard
from data.text import TextTokenizer
from retrieval.towers.base import Towers, load_towers
from retrieval.towers.multiscale import MultiScaleConfig, MultiScaleTowers
from retrieval.vectors.embed import embed_shards
from retrieval.vectors.settings import EmbedSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, default=Path("data/samples/emoji"))
    parser.add_argument("--towers", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--repeat", type=int, default=4, help="every shard so many times")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    towers = load_towers(arguments.towers, arguments.device) if arguments.towers else random_towers(arguments.shards)
    towers.to(arguments.device)
    size, workers = arguments.batch_size, arguments.workers or cores()
    wall: dict[str, list[float]] = {"bare": [], "side by side": [], "embed": []}
    busy: dict[str, list[float]] = {name: [] for name in wall}
    with tempfile.TemporaryDirectory() as scratch:
        shards = [
            Path(shutil.copy(shard, Path(scratch) / f"{number:05d}.tar"))
            for number, shard in enumerate(expand_shards(arguments.shards, arguments.split) * arguments.repeat)
        ]
        started = time.process_time()
        encoded = [sample.require_image() for shard in shards for sample in read_shard(shard, fail)]
        reading = time.process_time() - started
        started = time.process_time()
        pixels = [towers.preprocess(open_image(image)) for image in encoded]
        batches = [torch.stack(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        decoding = time.process_time() - started
        passes = {
            "bare": lambda: [towers.encode_image(batch, size) for batch in batches],
            "side by side": lambda: list(in_order(lambda batch: towers.encode_image(batch, size), batches, workers)),
            "embed": lambda: embed_shards(
                towers, shards, Path(scratch) / "out", EmbedSettings(texts=False, batch_size=size, workers=workers)
            ),
        }
        towers.encode_image(batches[0])  # warm
        for _ in range(arguments.runs):
            for name, work in passes.items():
                started, start = time.perf_counter(), time.process_time()
                work()
                wall[name].append(time.perf_counter() - started)
                busy[name].append(time.process_time() - start)
            shutil.rmtree(Path(scratch) / "out")
    rates = {name: len(pixels) / statistics.median(times) for name, times in wall.items()}
    milliseconds = {name: 1000 * statistics.median(times) / len(pixels) for name, times in busy.items()}
    encode, decode = milliseconds["side by side"], 1000 * (reading + decoding) / len(pixels)
    print(f"{'':14}  pictures/s   CPU ms a picture")
    for name, rate in rates.items():
        print(f"{name:14} {rate:11.1f} {milliseconds[name]:18.3f}")
    record = {
        "pictures": len(pixels),
        "bare_per_s": round(rates["bare"], 1),
        "side_by_side_per_s": round(rates["side by side"], 1),
        "embed_per_s": round(rates["embed"], 1),
        "ratio": round(rates["embed"] / rates["bare"], 3),
        "ratio_side_by_side": round(rates["embed"] / rates["side by side"], 3),
        "read_cpu_ms": round(1000 * reading / len(pixels), 3),
        "decode_cpu_ms": round(1000 * decoding / len(pixels), 3),
        "encode_cpu_ms": round(encode, 3),
        "embed_cpu_ms": round(milliseconds["embed"], 3),
        "limit_side_by_side": round(encode / (encode + decode), 3),
        "batch_size": size,
        "workers": workers,
        "threads": torch.get_num_threads(),
        "cores": cores(),
        "device": arguments.device,
    }
    print(json.dumps(record))


def fail(reason: str, name: str, error: Exception) -> None:
    raise error


def random_towers(shards: Path) -> Towers:
    text = TextTokenizer(shards / "text.model")
    torch.manual_seed(0)
    return MultiScaleTowers(MultiScaleConfig(num_text_pieces=text.vocab_size, text_hash=text.content_hash), text).eval()


if __name__ == "__main__":
    main()
