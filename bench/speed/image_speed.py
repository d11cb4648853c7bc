"""CPU time that a picture takes from encoded bytes to a square tensor, by decoder; and shard reading in MB/s.

    python -m bench.speed.image_speed [--shards data/samples/emoji] [--pictures 64] [--photos 12] [--sizes 128 224]

Decoders, on one thread: ours (`open_image`, `to_square`, `to_tensor`: Pillow); ours with `least_side`, that is JPEGs
decoded at a half, a quarter or an eighth by their DCT, no smaller than twice (or once) the square; simplejpeg
(libjpeg-turbo), whole and scaled likewise; `torchvision.io.decode_image`. All but the last are cut and resized by
`to_square`; the last by torchvision's own bicubic filter, on tensors. Sources: the pictures of the shards as they are,
and JPEGs of quality 90 made of them: enlarged, on a gradient, with noise, since there are no photographs here.
`differs` is the mean and the largest difference from ours, in grey levels of 255.

Reading: the file in one go; `tarfile`; webdataset; `read_shard`, which also parses captions and checks the end; by
number in a shuffled order (`ShuffledShards`), the members alone, and as samples, the index being there.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from webdataset.tariterators import tarfile_samples

from data.images import open_image, to_square, to_tensor
from data.reading import expand_shards, read_shard
from data.shard_index import ShuffledShards

Item = TypeVar("Item")
Result = TypeVar("Result")


class Decoder(Protocol):
    """Encoded bytes -> float32 [3, size, size] in [0, 1]."""

    def __call__(self, content: bytes, size: int) -> Tensor: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, default=Path("data/samples/emoji"))
    parser.add_argument("--split", default="train")
    parser.add_argument("--pictures", type=int, default=64, help="of the shards, as they are")
    parser.add_argument("--photos", type=int, default=12, help="JPEGs of each side")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024], help="pixels a side of the JPEGs")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 224], help="pixels a side of the squares")
    parser.add_argument("--runs", type=int, default=3, help="the least time of so many counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shards = expand_shards(arguments.shards, arguments.split)
    encoded = [sample.require_image() for shard in shards for sample in read_shard(shard, fail)][: arguments.pictures]
    sources = {"as stored": encoded}
    for side in arguments.sides:
        sources[f"JPEG {side} px"] = [photo(content, side) for content in encoded[: arguments.photos]]
    rows = []
    print(f"{'source':12} {'KB':>6} {'square':>6} {'decoder':18} {'CPU ms':>8} {'differs':>12}")
    for source, pictures in sources.items():
        for size in arguments.sizes:
            expected = [ours(content, size) for content in pictures]
            for name, decoder in decoders(jpeg=source != "as stored").items():
                best, tensors = least(partial(decoder, size=size), pictures, arguments.runs)
                gaps = [(a - b).abs() * 255 for a, b in zip(tensors, expected, strict=True)]
                row = {
                    "source": source,
                    "kilobytes": round(sum(map(len, pictures)) / len(pictures) / 1000, 1),
                    "size": size,
                    "decoder": name,
                    "cpu_ms": round(1000 * best / len(pictures), 3),
                    "mean_difference": round(float(torch.stack(gaps).mean()), 2),
                    "largest_difference": round(max(float(gap.max()) for gap in gaps)),
                }
                rows.append(row)
                print(
                    f"{source:12} {row['kilobytes']:6} {size:6} {name:18} {row['cpu_ms']:8.3f} "
                    f"{row['mean_difference']:7.2f} {row['largest_difference']:4}"
                )
    rates = reading(shards, arguments.runs)
    print("\nreading      MB per CPU second")
    for name, rate in rates.items():
        print(f"{name:12} {rate:8.1f}")
    print(json.dumps({"decoding": rows, "reading_mb_per_cpu_s": rates}))


def ours(content: bytes, size: int) -> Tensor:
    return to_tensor(to_square(open_image(content), size))


def drafted(content: bytes, size: int, margin: int) -> Tensor:
    return to_tensor(to_square(open_image(content, least_side=margin * size), size))


def torchvision_io(content: bytes, size: int) -> Tensor:
    stored = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    pixels = torchvision.io.decode_image(stored, torchvision.io.ImageReadMode.RGB)
    resized = F.resize(pixels, [size], F.InterpolationMode.BICUBIC, antialias=True)
    return F.center_crop(resized, [size, size]).float() / 255


def decoders(jpeg: bool) -> dict[str, Decoder]:
    found: dict[str, Decoder] = {"ours": ours, "torchvision.io": torchvision_io}
    if not jpeg:
        return found
    found |= {"draft, twice": partial(drafted, margin=2), "draft, once": partial(drafted, margin=1)}
    try:
        import simplejpeg
    except ImportError:
        print("simplejpeg is not installed: left out")
        return found

    def whole(content: bytes, size: int) -> Tensor:
        return to_tensor(to_square(Image.fromarray(simplejpeg.decode_jpeg(content)), size))

    def scaled(content: bytes, size: int) -> Tensor:
        pixels = simplejpeg.decode_jpeg(content, min_height=2 * size, min_width=2 * size)
        return to_tensor(to_square(Image.fromarray(pixels), size))

    return found | {"simplejpeg": whole, "simplejpeg, twice": scaled}


def photo(content: bytes, side: int) -> bytes:
    """A JPEG of about the detail of a photograph: the picture enlarged, on a gradient, under noise."""
    noise = numpy.random.default_rng(len(content)).normal(0, 6, (side, side, 3))
    gradient = numpy.linspace(0.5, 1, side)[:, None, None]
    enlarged = numpy.asarray(open_image(content).resize((side, side), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    pixels = (enlarged * gradient + noise).clip(0, 255).astype(numpy.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def reading(shards: Sequence[Path], runs: int) -> dict[str, float]:
    """Megabytes (10^6) a second of CPU time, from the page cache."""

    def with_tarfile(shard: Path) -> None:
        with tarfile.open(shard) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                file.read()

    readers: dict[str, Callable[[Path], object]] = {
        "file": Path.read_bytes,
        "tarfile": with_tarfile,
        "webdataset": lambda shard: list(tarfile_samples([{"url": str(shard.absolute())}])),
        "read_shard": lambda shard: list(read_shard(shard, fail)),
    }
    megabytes = sum(shard.stat().st_size for shard in shards) / 1e6
    found = {name: round(megabytes / least(read, shards, runs)[0], 1) for name, read in readers.items()}
    numbered = ShuffledShards(shards, shuffle=2000)
    places = [numbered.locate(0, place) for place in range(len(numbered))]  # also reads the indices
    for name, work in (("members by number", numbered.members), ("samples by number", numbered.sample)):
        seconds, _ = least(lambda place, work=work: work(*place), places, runs)  # type: ignore[misc]
        found[name] = round(megabytes / seconds, 1)
    return found


def least(work: Callable[[Item], Result], items: Sequence[Item], runs: int) -> tuple[float, list[Result]]:
    """The least CPU seconds of `runs` times `work` of each item, and what it made."""
    seconds = []
    for _ in range(runs):
        started = time.process_time()
        made = [work(item) for item in items]
        seconds.append(time.process_time() - started)
    return min(seconds), made


def fail(reason: str, name: str, error: Exception) -> None:
    raise error


if __name__ == "__main__":
    main()
