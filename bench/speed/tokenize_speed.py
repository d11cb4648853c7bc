"""Pictures a second of `tokenize` over shards against the bare forward pass on the same pictures in memory.

    python -m bench.speed.tokenize_speed [--shards data/samples/emoji] [--model emoji] [--repeat 2]

Measured in turn, `--runs` times: the bare pass as it comes, one batch after the other on all of PyTorch's threads; the
same batches side by side, as `tokenize` encodes them; and `tokenize_shards`, from tar files to tar files. `share_cpu`
is the CPU time of the batches side by side, of that of `tokenize`; at most encode / (encode + read + decode).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy
import torch

from bench.speed.shard_passes import add_arguments, cpu_seconds, fail, measure_passes, print_record, report
from data.batches import in_order
from data.images import open_image, to_batch, to_square
from data.reading import expand_shards, read_shard
from data.shards import Manifest, ShardInfo, file_sha256, write_manifest
from mmwudao.loading.model_dir import load_tokenizer
from vqvae.tokenize import TokenizeSettings, tokenize_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, repeat=2)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--size", type=int, default=128)
    arguments = parser.parse_args()
    size, workers = arguments.size, arguments.workers
    model = load_tokenizer(arguments.model).to(arguments.device, torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        shards = repeated(arguments.shards, arguments.split, arguments.repeat, Path(scratch) / "shards")
        codes = Path(scratch) / "codes"
        started = cpu_seconds()
        encoded = [sample.require_image() for shard in expand_shards(shards) for sample in read_shard(shard, fail)]
        reading = cpu_seconds() - started
        started = cpu_seconds()
        squares = [numpy.asarray(to_square(open_image(image), size)) for image in encoded]
        starts = range(0, len(squares), arguments.batch_size)
        batches = [to_batch(squares[k : k + arguments.batch_size], arguments.device) for k in starts]
        apart = {"read": reading, "decode": cpu_seconds() - started}
        settings = TokenizeSettings(
            size, arguments.batch_size, workers=workers, device=arguments.device, progress=False
        )
        passes = {
            "bare": lambda: [model.encode(batch).cpu() for batch in batches],
            "side by side": lambda: list(in_order(lambda batch: model.encode(batch).cpu(), batches, workers)),
            "tokenize": lambda: tokenize_shards(model, shards, codes, settings),
        }
        model.encode(batches[0])  # warm
        measured = measure_passes(passes, arguments.runs, lambda: shutil.rmtree(codes))
        stored = sum(shard.stat().st_size for shard in expand_shards(shards))
        print_record(report(measured, len(squares), stored, "tokenize", apart), arguments)


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


if __name__ == "__main__":
    main()
