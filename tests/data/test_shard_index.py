"""Samples of shards by number: the index beside a shard, and the order that a seed decides."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image

from data.reading import BROKEN_SHARD, CORRUPT_IMAGE, SkipLog, expand_shards, read_shard
from data.sample import Caption, DataError, Sample
from data.shard_index import ShuffledShards, index_path, open_index
from data.shards import Manifest, ShardWriter, write_manifest

COUNT = 53


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of 10 samples, the last of 3; every ninth picture is of another family."""
    with ShardWriter(tmp_path, "train", 10) as writer:
        for number in range(COUNT):
            family = "other" if number % 9 == 8 else "noto"
            captions = {"en": Caption(f"picture {number}")}
            writer.write(Sample(f"s{number:03d}", picture(number), "png", captions, family=family))
    write_manifest(tmp_path, Manifest("numbers", 4, {"train": writer.shards}))
    return tmp_path


def shuffled(folder: Path, shuffle: int = 20, seed: int = 0, **options) -> ShuffledShards:
    return ShuffledShards(expand_shards(folder, "train"), shuffle=shuffle, seed=seed, **options)


def ids(shards: ShuffledShards, positions) -> list[str]:
    return [shards.at(position).sample.id for position in positions]


@pytest.mark.parametrize("shuffle", [0, 1, 20, 1000])
def test_an_epoch_has_every_sample_once(folder, shuffle):
    shards = shuffled(folder, shuffle)
    assert len(shards) == COUNT
    first, second = ids(shards, range(COUNT)), ids(shards, range(COUNT, 2 * COUNT))
    every = [f"s{number:03d}" for number in range(COUNT)]
    assert sorted(first) == sorted(second) == every
    if shuffle:
        assert first != every
        assert first != second
    else:
        assert first == second == every


def test_the_seed_and_the_place_decide(folder):
    """No memory: any process reads any place at any time."""
    order = ids(shuffled(folder), range(2 * COUNT))
    assert ids(shuffled(folder), reversed(range(2 * COUNT))) == order[::-1]
    assert ids(shuffled(folder, seed=1), range(COUNT)) != order[:COUNT]
    for processes in (2, 4):
        parts = [ids(shuffled(folder), range(rank, COUNT, processes)) for rank in range(processes)]
        assert [parts[place % processes][place // processes] for place in range(COUNT)] == order[:COUNT]


def test_a_window_is_of_whole_shards(folder):
    order = ids(shuffled(folder, 20), range(20))
    assert len({int(name[1:]) // 10 for name in order}) <= 3  # two full shards, or the short one between two


def test_pictures_and_captions_are_those_of_the_stream(folder):
    def refuse(reason: str, name: str, error: Exception) -> None:
        pytest.fail(f"{name}: {reason}")

    shards = shuffled(folder, 0)
    streamed = [sample for shard in expand_shards(folder, "train") for sample in read_shard(shard, refuse)]
    for place, expected in enumerate(streamed):
        sample, image = shards.at(place)
        assert sample == expected
        assert image.getpixel((0, 0)) == (place, 0, 0)


def test_an_index_is_made_once_and_again_for_another_shard(folder):
    shuffled(folder)
    shard = expand_shards(folder, "train")[0]
    path = index_path(shard)
    head = json.loads(path.read_text().splitlines()[0])
    assert head["samples"] == 10
    before = path.stat().st_mtime_ns, path.stat().st_ino
    shuffled(folder)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    other = expand_shards(folder, "train")[-1].read_bytes()
    shard.write_bytes(other)
    assert len(shuffled(folder)) == COUNT - 7
    path.write_text("damaged")
    assert len(shuffled(folder)) == COUNT - 7
    data = bytearray(other)
    data[600] ^= 255  # of the same size
    shard.write_bytes(data)
    assert json.loads(path.read_text().splitlines()[0])["digest"] != head["digest"]
    digest = json.loads(path.read_text().splitlines()[0])["digest"]
    open_index(shard, SkipLog())
    assert json.loads(path.read_text().splitlines()[0])["digest"] != digest


def test_the_place_of_what_cannot_be_used_is_taken_by_the_next(folder):
    shard = expand_shards(folder, "train")[0]
    data = shard.read_bytes()
    whole = picture(3)
    assert data.count(whole) == 1
    shard.write_bytes(data.replace(whole, bytes(len(whole))))
    log = SkipLog()
    shards = shuffled(folder, 0, exclude_families=["other"], log=log)
    assert ids(shards, [2, 3, 4, 8, 9]) == ["s002", "s004", "s004", "s009", "s009"]
    assert log.counts == {CORRUPT_IMAGE: 1}


def test_a_shard_that_is_cut_short_gives_what_is_whole(folder):
    shard = expand_shards(folder, "train")[0]
    with tarfile.open(shard) as archive:
        member = archive.getmembers()[11]
    shard.write_bytes(shard.read_bytes()[: member.offset_data + 5])
    log = SkipLog()
    shards = shuffled(folder, 0, log=log)
    assert COUNT - 6 <= len(shards) <= COUNT - 4
    assert log.counts == {BROKEN_SHARD: 1}
    assert ids(shards, [0, 1]) == ["s000", "s001"]
    again = SkipLog()
    shuffled(folder, 0, log=again)
    assert again.counts == {BROKEN_SHARD: 1}, "the index remembers"


def test_what_cannot_be_read_is_one_line(folder, tmp_path):
    for shard in expand_shards(folder, "train"):
        shard.write_bytes(bytes(10240))
    with pytest.raises(DataError, match="no readable sample in 6 shards") as error:
        shuffled(folder)
    assert "\n" not in str(error.value)
    packed = tmp_path / "train-00000.tar.gz"
    packed.write_bytes(b"")
    with pytest.raises(DataError, match=r"is compressed: unpack it"):
        ShuffledShards([packed])


def test_a_disk_without_room_for_an_index_is_read_all_the_same(folder, monkeypatch, caplog):
    order = ids(shuffled(folder), range(COUNT))
    for path in folder.glob("*.index"):
        path.unlink()

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.shard_index.write_file", full)
    assert ids(shuffled(folder), range(COUNT)) == order
    assert "No space left" in caplog.text


def test_webdataset_reads_shards_beside_their_indices(folder):
    shuffled(folder)
    urls = [str(shard) for shard in expand_shards(folder, "train")]
    assert len(urls) == 6
    assert len(list(wds.WebDataset(urls, shardshuffle=False))) == COUNT
