"""Pictures a second of `embed` against the bare forward pass on the same batches, already decoded and in memory.

    python bench/embed_speed.py [--shards data/samples/emoji] [--towers FOLDER]

Without --towers, our default architecture with random weights. The two are measured in turn, `--runs` times; the JSON
holds the medians, and the CPU time that one picture takes to decode and to encode: where the towers run on all cores,
decoding has to share them, and the ratio cannot exceed encode / (encode + decode).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from data.reading import open_shards
from data.text import TextTokenizer
from retrieval.embed import embed_shards
from retrieval.model import EmojiTowers, TowersConfig
from retrieval.towers import Towers, load_towers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, default=Path("data/samples/emoji"))
    parser.add_argument("--towers", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    towers = load_towers(arguments.towers, arguments.device) if arguments.towers else random_towers(arguments.shards)
    towers.to(arguments.device)
    images = [image for _, image in open_shards(arguments.shards, arguments.split)]
    pixels = torch.stack([towers.preprocess(image) for image in images])
    towers.encode_image(pixels[: arguments.batch_size])  # warm
    bare, whole, encoding = [], [], 0.0
    for _ in range(arguments.runs):
        started, busy = time.perf_counter(), time.process_time()
        towers.encode_image(pixels, arguments.batch_size)
        bare.append(time.perf_counter() - started)
        encoding += (time.process_time() - busy) / arguments.runs
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            embed_shards(
                towers, arguments.shards, Path(folder) / "out", split=arguments.split, texts=False,
                batch_size=arguments.batch_size, workers=arguments.workers,
            )  # fmt: skip
            whole.append(time.perf_counter() - started)
    started = time.process_time()
    for _ in map(towers.preprocess, (image for _, image in open_shards(arguments.shards, arguments.split))):
        pass
    decoding = time.process_time() - started
    record = {
        "pictures": len(images),
        "bare_per_s": round(len(images) / statistics.median(bare), 1),
        "embed_per_s": round(len(images) / statistics.median(whole), 1),
        "ratio": round(statistics.median(bare) / statistics.median(whole), 3),
        "encode_cpu_ms": round(1000 * encoding / len(images), 3),
        "decode_cpu_ms": round(1000 * decoding / len(images), 3),
        "batch_size": arguments.batch_size,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "device": arguments.device,
    }
    print(json.dumps(record))


def random_towers(shards: Path) -> Towers:
    text = TextTokenizer(shards / "text.model")
    torch.manual_seed(0)
    return EmojiTowers(TowersConfig(num_text_pieces=text.vocab_size, text_hash=text.content_hash), text).eval()


if __name__ == "__main__":
    main()
