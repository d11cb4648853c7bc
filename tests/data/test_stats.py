import io
import json
from dataclasses import asdict

import pytest
from PIL import Image

from data.sample import Caption, DataError, Sample
from data.shards import ShardWriter
from data.stats import CaptionStats, format_stats, shard_stats


def sample(key: str, colour: int, size=(8, 8), captions=None, **fields) -> Sample:
    file = io.BytesIO()
    Image.new("L", size, colour).save(file, "PNG")
    return Sample(key, file.getvalue(), "png", captions or {"en": Caption("red heart", ("love", "red"))}, **fields)


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path, "train", 3) as writer:
        writer.write(sample("a", 1, family="noto", licence="MIT"))
        writer.write(sample("b", 2, captions={"en": Caption("sun"), "zh": Caption("太阳", ("天气",))}, family="noto"))
        writer.write(sample("c", 1, family="twemoji"))  # the picture of a
        writer.write(sample("d", 3, size=(16, 9)))
    with ShardWriter(tmp_path, "test-concept") as writer:
        writer.write(sample("a", 1, family="noto"))  # and again, under the same id
        writer.write(sample("e", 4, size=(16, 9)))
        writer.write(Sample("f", b"corrupt", "png", {"en": Caption("x")}))
    return tmp_path


def test_counts(shards):
    stats = shard_stats(shards)
    assert (stats.shards, stats.samples) == (3, 6)
    assert stats.bytes == sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert 0 < stats.image_bytes < stats.bytes
    assert stats.splits == {"train": 4, "test-concept": 2}
    assert stats.families == {"noto": 3, "none": 2, "twemoji": 1}
    assert stats.licences == {"none": 5, "MIT": 1}
    assert stats.sizes == {"8x8": 4, "16x9": 2}
    assert stats.formats == {"png": 6}
    assert stats.duplicate_images == 2
    assert stats.duplicate_images_across_splits == 1
    assert stats.duplicate_ids == 1
    assert stats.skipped == {"corrupt image": 1}
    assert stats.languages == {
        "en": CaptionStats(samples=6, distinct=2, shortest=3, mean=8.0, longest=9, keywords=10 / 6),
        "zh": CaptionStats(samples=1, distinct=1, shortest=2, mean=2.0, longest=2, keywords=1.0),
    }
    assert list(stats.languages) == ["en", "zh"]


def test_one_shard_and_a_pattern(shards):
    assert shard_stats(shards / "train-00001.tar").samples == 1
    assert shard_stats([str(shards / "train-{00000..00001}.tar")]).splits == {"train": 4}
    with pytest.raises(DataError, match="no shard"):
        shard_stats(shards / "none.tar")


def test_table_and_json(shards):
    stats = shard_stats(shards)
    text = format_stats(stats, most=2)
    assert "6 in 3 shards" in text
    assert "noto 3, none 2, and 1 more" in text
    assert "2 pictures (1 of them across splits), 1 ids" in text
    assert "3..8.0..9" in text
    assert json.loads(json.dumps(asdict(stats)))["languages"]["zh"]["distinct"] == 1


def test_a_truncated_shard_is_reported(shards):
    path = shards / "train-00000.tar"
    content = path.read_bytes().rstrip(b"\0")  # tar pads its end
    path.write_bytes(content[: len(content) // 2])
    stats = shard_stats(path)
    assert 0 < stats.samples < 3
    assert stats.skipped["truncated or broken shard"] == 1
