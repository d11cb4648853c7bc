"""Pictures a second of `mmwudao index build FOLDER`, beside other shapes of image towers.

    python -m bench.speed.photo_speed [--models emoji open_clip:ViT-B-32 open_clip:MobileCLIP-S1] [--photos FOLDER]

A model is a shipped name, a model directory, a folder of towers, or `open_clip:NAME` with random weights. Without
--photos, `--count` JPEG files of `--size` pixels are made, with detail as fine as a camera's. Of each model: reading
and decoding one picture on one core, encoding one on one thread, and all of it, from files to a collection, on
`--workers` cores. On cores that do nothing else, all of it cannot exceed workers / (decode + encode).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from data.batches import cores
from data.photos.decoding import DecodedPhoto, PhotoJob, decode_photo
from data.photos.files import PhotoSettings, find_photos
from mmwudao.loading.towers import load_model_towers
from retrieval.photos.indexing import BATCH, PhotoRequest, index_photos
from retrieval.towers.base import Towers

SHAPE = "open_clip:"
TEXT_MODEL = Path(__file__).parents[2] / "data" / "samples" / "emoji" / "text.model"
TARGET = 25.0  # pictures a second on two cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["emoji", f"{SHAPE}ViT-B-32", f"{SHAPE}MobileCLIP-S1"])
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--size", default="4000x3000")
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--sample", type=int, default=16, help="so many pictures are decoded and encoded alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.photos or make_photos(Path(scratch) / "photos", arguments.count, arguments.size)
        for name in arguments.models:
            record = measure(name, folder, Path(scratch) / f"collection-{len(name)}", arguments)
            print(json.dumps(record), flush=True)


def measure(name: str, folder: Path, collection: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """The figures of one model."""
    towers = load(name)
    photos = find_photos(folder, PhotoSettings()).photos[: arguments.sample]
    jobs = [PhotoJob(str(folder / photo.path), towers.image_size) for photo in photos]
    started = time.process_time()
    decoded = [one for one in map(decode_photo, jobs) if isinstance(one, DecodedPhoto)]
    decoding = (time.process_time() - started) / len(jobs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pictures = [Image.fromarray(one.pixels) for one in decoded if one.pixels is not None]
    towers.encode_image(pictures[:2])  # warm
    started = time.process_time()
    towers.encode_image(pictures, BATCH)
    encoding = (time.process_time() - started) / len(pictures)
    torch.set_num_threads(threads)
    request = PhotoRequest(folder, collection, workers=arguments.workers)
    started = time.perf_counter()
    report = index_photos(lambda: towers, request)
    seconds = time.perf_counter() - started
    return {
        "model": name,
        "image_size": towers.image_size,
        "image_parameters": sum(p.numel() for n, p in towers.named_parameters() if "text" not in n),
        "pictures": report.items,
        "pictures_per_s": round(report.items / seconds, 2),
        "target_per_s_on_two_cores": TARGET,
        "decode_cpu_ms": round(1000 * decoding, 2),
        "encode_cpu_ms": round(1000 * encoding, 2),
        "limit_per_s": round(arguments.workers / (decoding + encoding), 1),
        "workers": arguments.workers,
        "load_average": round(os.getloadavg()[0], 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "peak_mb_of_a_decoder": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
    }


def load(name: str) -> Towers:
    """The towers of that name, in eval mode on the CPU."""
    if not name.startswith(SHAPE):
        return load_model_towers(name, "cpu")
    from retrieval.towers.open_clip import OpenClipTowers

    torch.manual_seed(0)
    return OpenClipTowers.from_scratch(name.removeprefix(SHAPE), TEXT_MODEL).eval()


def make_photos(folder: Path, count: int, size: str) -> Path:
    """`count` JPEG files, of a few different pictures: smooth shapes with fine noise, at a camera's quality."""
    width, height = map(int, size.split("x"))
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    encoded = []
    for k in range(min(count, 4)):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), 3)
        noise = Image.fromarray(random.integers(96, 160, (height, width, 3), dtype=np.uint8))
        picture = Image.blend(coarse, noise.filter(ImageFilter.BoxBlur(1)), 0.3)
        path = folder / f"{k}.jpg"
        picture.save(path, quality=90)
        encoded.append(path.read_bytes())
        path.unlink()
    for k in range(count):
        (folder / f"IMG_{k:05}.JPG").write_bytes(encoded[k % len(encoded)])
    return folder


if __name__ == "__main__":
    main()
