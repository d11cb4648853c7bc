"""Shards of coloured squares, whose captions tell the colour."""

import io
from pathlib import Path

from PIL import Image

from data.sample import Caption, Sample
from data.shards import Manifest, ShardWriter, write_manifest

COLOURS = ("red", "lime", "blue", "yellow")


def write_squares(folder: Path) -> Path:
    """24 pictures of 32 pixels, 16 to train on and 8 to test on; returns `folder`."""
    with ShardWriter(folder, "train", 100) as train, ShardWriter(folder, "test", 100) as test:
        for number in range(24):
            colour = COLOURS[number % 4]
            picture = io.BytesIO()
            Image.new("RGB", (32, 32), colour).save(picture, "PNG")
            captions = {"en": Caption(f"{colour} square", ("shape",)), "zh": Caption(f"方 {colour[::-1]}")}
            sample = Sample(f"s{number}", picture.getvalue(), "png", captions, "noto", colour, colour)
            (test if number >= 16 else train).write(sample)
    splits = {"train": train.shards, "test": test.shards}
    write_manifest(folder, Manifest(name="squares", image_size=32, splits=splits, sources={}, skipped={}))
    return folder
