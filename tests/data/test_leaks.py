"""Near copies of pictures (`data.fingerprints`) and those across the splits (`data.leaks`)."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data.fingerprints import fingerprint, near_pairs, read_fingerprints
from data.leaks import find_leaks, format_leaks
from data.sample import Caption, DataError, Sample
from data.settings import NearSettings
from data.shards import ShardWriter

imagehash = pytest.importorskip("imagehash")


def drawing(seed: int, size: int = 64, colour: str | None = None) -> Image.Image:
    """Some random ellipses on white; another `colour` for all of them is another picture of the same shape."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (256, 256), "white")
    for _ in range(6):
        left, top, width, height = (int(value) for value in rng.integers(10, 120, 4))
        fill = tuple(int(value) for value in rng.integers(0, 200, 3))
        ImageDraw.Draw(image).ellipse((left, top, left + width, top + height), fill=colour or fill)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def encoded(image: Image.Image, extension: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[extension], **options)
    return file.getvalue()


def sample(key: str, image: Image.Image, family: str = "noto", extension: str = "png", **options) -> Sample:
    return Sample(key, encoded(image, extension, **options), extension, {"en": Caption(key)}, family=family)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path, "train") as writer:
        for seed in range(20):
            writer.write(sample(f"train-{seed}", drawing(seed)))
    with ShardWriter(tmp_path, "test-family") as writer:
        writer.write(sample("same", drawing(3), "twemoji"))
        writer.write(sample("jpeg", drawing(4, 48), "twemoji", "jpg", quality=60))
        for seed in range(100, 108):
            writer.write(sample(f"other-{seed}", drawing(seed), "noto"))
    return tmp_path


def test_near_copies_in_train_are_found(shards: Path) -> None:
    report = find_leaks(shards)
    assert report.train == 20
    assert report.pictures == {"test-family": {"noto": 8, "twemoji": 2}}
    assert [(leak.test.id, leak.train.id) for leak in report.leaks] == [("same", "train-3"), ("jpeg", "train-4")]
    assert (report.leaks[0].distance, report.leaks[0].colour, report.leaks[0].cosine) == (0, 0.0, None)
    text = format_leaks(report)
    assert "test-family: 2 of 10 pictures have one (20.0%)" in text
    assert "same (test-family) ~ train-3: 0 bits" in text


def test_the_cosine_of_an_embedder(shards: Path) -> None:
    def embed(images: list[Image.Image]) -> np.ndarray:
        flat = np.stack([np.asarray(image.resize((4, 4)), np.float32).ravel() for image in images])
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    report = find_leaks(shards, embed=embed)
    assert report.leaks[0].cosine == pytest.approx(1)
    assert "cosine 1.000" in format_leaks(report)


def test_another_colour_is_another_picture() -> None:
    red, blue = (fingerprint(drawing(1, colour=colour)) for colour in ("#c22", "#22c"))
    assert (red[0] ^ blue[0]).bit_count() <= 6
    assert np.abs(red[1].astype(int) - blue[1]).mean() / 255 > 0.06


def test_pairs_are_complete(shards: Path) -> None:
    everything = read_fingerprints(shards)
    settings = NearSettings(distance=20, colour=0.3)
    found = {(a, b) for a, b, _, _ in near_pairs(everything, everything, settings)}
    for a in range(len(everything.names)):
        for b in range(len(everything.names)):
            bits = int(everything.hashes[a] ^ everything.hashes[b]).bit_count()
            small = everything.thumbnails.astype(int)
            near = bits <= 20 and np.abs(small[a] - small[b]).mean() / 255 <= 0.3
            assert ((a, b) in found) == near


def test_a_split_is_missing(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train") as writer:
        writer.write(sample("a", drawing(1)))
    with pytest.raises(DataError, match="no other picture"):
        find_leaks(tmp_path)


def test_limits() -> None:
    with pytest.raises(DataError, match="distance must be a whole number from 0 to 64, not 65"):
        NearSettings(distance=65)
