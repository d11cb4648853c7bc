"""Pictures a second of `tokenize` over shards against the bare forward pass on the same pictures in memory.

    python bench/speed/tokenize_speed.py [--shards data/samples/emoji] [--model emoji] [--repeat 2]

Measured in turn, `--runs` times: the bare pass as it comes, one batch after the other on all of PyTorch's threads; the
same batches side by side, as `tokenize` encodes them; and `tokenize_shards`, from tar files to tar files. The JSON
holds the medians, and CPU times of one picture, in which threads that wait for each other count as busy. On cores that
both share, `tokenize` cannot exceed encode / (encode + read + decode) of the batches side by side.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy
import torch

from data.batches import cores, in_order
from data.images import open_image, to_batch, to_square
from data.reading import expand_shards, read_shard
from data.shards import Manifest, ShardInfo, file_sha256, write_manifest
from mmwudao.loading.model_dir import load_tokenizer
from vqvae.tokenize import TokenizeSettings, tokenize_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, default=Path("data/samples/emoji"))
    parser.add_argument("--split", default="train")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=2, help="every shard so many times")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    size, workers = arguments.size, arguments.workers or cores()
    model = load_tokenizer(arguments.model).to(arguments.device, torch.float32)
    wall: dict[str, list[float]] = {"bare": [], "side by side": [], "tokenize": []}
    busy: dict[str, list[float]] = {name: [] for name in wall}
    with tempfile.TemporaryDirectory() as scratch:
        shards = repeated(arguments.shards, arguments.split, arguments.repeat, Path(scratch) / "shards")
        started = time.process_time()
        encoded = [sample.require_image() for shard in expand_shards(shards) for sample in read_shard(shard, fail)]
        reading = time.process_time() - started
        started = time.process_time()
        squares = [numpy.asarray(to_square(open_image(image), size)) for image in encoded]
        starts = range(0, len(squares), arguments.batch_size)
        batches = [to_batch(squares[k : k + arguments.batch_size], arguments.device) for k in starts]
        decoding = time.process_time() - started
        passes = {
            "bare": lambda: [model.encode(batch).cpu() for batch in batches],
            "side by side": lambda: list(in_order(lambda batch: model.encode(batch).cpu(), batches, workers)),
            "tokenize": lambda: tokenize_shards(
                model, shards, Path(scratch) / "codes",
                TokenizeSettings(size, arguments.batch_size, workers=workers, device=arguments.device, progress=False),
            ),
        }  # fmt: skip
        model.encode(batches[0])  # warm
        for _ in range(arguments.runs):
            for name, work in passes.items():
                started, start = time.perf_counter(), time.process_time()
                work()
                wall[name].append(time.perf_counter() - started)
                busy[name].append(time.process_time() - start)
            shutil.rmtree(Path(scratch) / "codes")
    rates = {name: len(squares) / statistics.median(times) for name, times in wall.items()}
    milliseconds = {name: 1000 * statistics.median(times) / len(squares) for name, times in busy.items()}
    encode, decode = milliseconds["side by side"], 1000 * (reading + decoding) / len(squares)
    print(f"{'':14}  pictures/s   CPU ms a picture")
    for name, rate in rates.items():
        print(f"{name:14} {rate:11.1f} {milliseconds[name]:18.3f}")
    record = {
        "pictures": len(squares),
        "bare_per_s": round(rates["bare"], 1),
        "side_by_side_per_s": round(rates["side by side"], 1),
        "tokenize_per_s": round(rates["tokenize"], 1),
        "ratio": round(rates["tokenize"] / rates["bare"], 3),
        "ratio_side_by_side": round(rates["tokenize"] / rates["side by side"], 3),
        "read_cpu_ms": round(1000 * reading / len(squares), 3),
        "decode_cpu_ms": round(1000 * decoding / len(squares), 3),
        "encode_cpu_ms": round(encode, 3),
        "tokenize_cpu_ms": round(milliseconds["tokenize"], 3),
        "limit_side_by_side": round(encode / (encode + decode), 3),
        "size": size,
        "batch_size": arguments.batch_size,
        "workers": workers,
        "threads": torch.get_num_threads(),
        "cores": cores(),
        "device": arguments.device,
    }
    print(json.dumps(record))


def repeated(source: Path, split: str, times: int, folder: Path) -> Path:
    """`folder` with every shard of `split` so many times, as a split of its own."""
    folder.mkdir()
    infos = []
    for number, shard in enumerate(expand_shards(source, split) * times):
        copy = Path(shutil.copy(shard, folder / f"train-{number:05d}.tar"))
        samples = sum(1 for _ in read_shard(shard, fail))
        infos.append(ShardInfo(copy.name, samples, copy.stat().st_size, file_sha256(copy)))
    write_manifest(folder, Manifest(source.name, None, {"train": infos}))
    return folder


def fail(reason: str, name: str, error: Exception) -> None:
    raise error


if __name__ == "__main__":
    main()
