import io
import json
import tarfile

import numpy
import pytest

from data.codes import CodedSample, read_codes, tokenizer_hash
from data.sample import Caption, DataError, Sample
from data.shards import Manifest, ShardInfo, ShardWriter, file_sha256, read_manifest, write_manifest


def sample(number: int, **changes) -> Sample:
    fields = {
        "id": f"noto-{number:04d}",
        "image": bytes([number % 256]) * 10,
        "extension": "webp",
        "captions": {"zh": Caption("红心", ("爱", "心")), "en": Caption(f"heart {number}")},
        "family": "noto",
        "concept": "2764",
        "base_concept": "2764",
        "licence": "Apache-2.0",
        "source": "npm:@iconify/json@2",
        **changes,
    }
    return Sample(**fields)


def write(folder, samples, per_shard=2000, split="train"):
    with ShardWriter(folder, split, per_shard) as writer:
        for item in samples:
            writer.write(item)
    return writer.shards


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# samples


def test_a_sample_comes_back_from_its_members():
    assert Sample.from_members("key", sample(3).to_members()) == sample(3)


def test_json_of_a_sample():
    assert json.loads(sample(1).to_members()["json"]) == {
        "id": "noto-0001",
        "captions": {"en": {"name": "heart 1", "keywords": []}, "zh": {"name": "红心", "keywords": ["爱", "心"]}},
        "family": "noto",
        "concept": "2764",
        "base_concept": "2764",
        "licence": "Apache-2.0",
        "source": "npm:@iconify/json@2",
    }


def test_members_of_img2dataset():
    record = {"caption": "a cat", "url": "https://example.org/cat.jpg", "key": "000000012", "status": "success"}
    found = Sample.from_members("12", {"jpg": b"x", "txt": b"a cat\n", "json": json.dumps(record).encode()})
    assert found == Sample("000000012", b"x", "jpg", {"und": Caption("a cat")}, source="https://example.org/cat.jpg")
    without_text = Sample.from_members("12", {"jpeg": b"x", "json": json.dumps(record).encode()})
    assert without_text.captions == {"und": Caption("a cat")}
    assert Sample.from_members("k", {"png": b"x", "txt": b"a"}).id == "k"


@pytest.mark.parametrize("members", [{"png": b"x"}, {"png": b"x", "txt": b" \n"}])
def test_a_picture_may_lack_captions(members):
    found = Sample.from_members("k", members)
    assert found.require_image() == b"x"
    assert found.captions == {}
    with pytest.raises(DataError, match="^sample k: no caption in .txt or .json$"):
        found.require_captions()


def test_captions_may_lack_a_picture():
    found = Sample.from_members("k", {"txt": b"a cat"})
    assert (found.image, found.extension) == (None, "")
    assert found.require_captions() == {"und": Caption("a cat")}
    assert set(found.to_members()) == {"json"}
    with pytest.raises(DataError, match="^sample k: no picture"):
        found.require_image()


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"png": b"x", "txt": b"\xff"}, "UTF-8"),
        ({"png": b"x", "json": b"{"}, "not JSON"),
        ({"png": b"x", "json": b"\xff"}, "not JSON"),
        ({"png": b"x", "json": b"[]"}, "not an object"),
        ({"png": b"x", "json": b'{"captions": ["a", 3]}'}, "'und'"),
        ({"png": b"x", "json": b'{"captions": {"en": 3}}'}, "'en'"),
        ({"png": b"x", "json": b'{"captions": {"en": {"name": "a", "keywords": "b"}}}'}, "'en'"),
    ],
)
def test_broken_members_are_named(members, problem):
    with pytest.raises(DataError) as error:
        Sample.from_members("the-key", members)
    assert "the-key" in one_line(error)
    assert problem in one_line(error)


# shards


def test_shards_are_deterministic_and_hold_nothing_of_the_machine(tmp_path):
    first, second = (write(tmp_path / name, map(sample, range(5)), per_shard=2) for name in "ab")
    assert first == second
    assert [(s.file, s.samples) for s in first] == [
        ("train-00000.tar", 2),
        ("train-00001.tar", 2),
        ("train-00002.tar", 1),
    ]
    for shard in first:
        path = tmp_path / "a" / shard.file
        assert path.stat().st_size == shard.bytes
        assert file_sha256(path) == shard.sha256
        with tarfile.open(path) as tar:
            for entry in tar:
                assert (entry.mtime, entry.uid, entry.gid, entry.mode) == (0, 0, 0, 0o644)
                assert (entry.uname, entry.gname) == ("", "")


def test_members_of_a_shard(tmp_path):
    write(tmp_path, [sample(1), sample(2)])
    with tarfile.open(tmp_path / "train-00000.tar") as tar:
        assert tar.getnames() == ["noto-0001.json", "noto-0001.webp", "noto-0002.json", "noto-0002.webp"]
        file = tar.extractfile("noto-0002.webp")
        assert file is not None
        assert file.read() == sample(2).image


def test_a_full_last_shard_is_not_followed_by_an_empty_one(tmp_path):
    assert [shard.samples for shard in write(tmp_path, map(sample, range(4)), per_shard=2)] == [2, 2]
    assert write(tmp_path / "none", []) == []
    assert list((tmp_path / "none").iterdir()) == []


def test_an_id_with_dots_keeps_them(tmp_path):
    from data.reading import read_shard

    dotted = sample(1, id="photo.v1.2")
    write(tmp_path, [dotted, sample(2)])
    with tarfile.open(tmp_path / "train-00000.tar") as tar:
        # webdataset takes what follows the first dot for the extension
        assert {name.partition(".")[0] for name in tar.getnames()} == {"photo_v1_2", "noto-0002"}
    problems: list[str] = []
    found = list(read_shard(tmp_path / "train-00000.tar", lambda reason, name, error: problems.append(reason)))
    assert (found, problems) == ([dotted, sample(2)], [])


def test_a_shard_needs_room_for_a_sample(tmp_path):
    with pytest.raises(DataError, match="at least 1, not 0"):
        ShardWriter(tmp_path, "train", 0)


# the manifest


def test_a_manifest_comes_back(tmp_path):
    shards = write(tmp_path, map(sample, range(5)), per_shard=3)
    manifest = Manifest("emoji", 128, {"train": shards, "test": []}, {"a": "1"}, {"z": 1, "b": 2})
    path = write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert manifest.samples("train") == 5
    record = json.loads(path.read_text())
    assert record["format"] == "mmwudao-shards/1"
    assert record["splits"]["train"]["samples"] == 5
    assert list(record["skipped"]) == ["b", "z"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "train-00000.tar", "train-00001.tar"]


def test_a_missing_manifest(tmp_path):
    with pytest.raises(DataError, match="mmwudao data build") as error:
        read_manifest(tmp_path)
    one_line(error)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff",
        b"[]",
        b"{}",
        b'{"format": "mmwudao-shards/9"}',
        b'{"format": "mmwudao-shards/1"}',
        b'{"format": "mmwudao-shards/1", "name": "a", "image_size": 1, "splits": []}',
        b'{"format": "mmwudao-shards/1", "name": "a", "image_size": 1, "splits": {"train": {"shards": [{"file": 1}]}}}',
    ],
)
def test_a_broken_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError) as error:
        read_manifest(tmp_path)
    assert "manifest.json" in one_line(error)


# codes


def write_codes(folder, count=5, per_shard=2, sources=None, dtype=numpy.uint16):
    grids = [numpy.full((2, 3), number, dtype) for number in range(count)]
    with ShardWriter(folder, "train", per_shard) as writer:
        for number, grid in enumerate(grids):
            coded = CodedSample(sample(number), grid)
            writer.write_members(coded.sample.id, coded.to_members())
    write_manifest(folder, Manifest("emoji", 16, {"train": writer.shards}, sources or {"tokenizer": "cafe"}))
    return grids


@pytest.mark.parametrize("dtype", [numpy.uint16, numpy.int32])
def test_codes_come_back_with_their_samples(tmp_path, dtype):
    grids = write_codes(tmp_path, dtype=dtype)
    found = list(read_codes(tmp_path, "train"))
    for number, (coded, grid) in enumerate(zip(found, grids, strict=True)):
        assert coded.codes.dtype == dtype
        assert numpy.array_equal(coded.codes, grid)
        assert coded.sample == sample(number, image=None, extension="")
    assert tokenizer_hash(tmp_path) == "cafe"


def test_shards_of_codes_are_deterministic(tmp_path):
    write_codes(tmp_path / "a")
    write_codes(tmp_path / "b")
    assert read_manifest(tmp_path / "a") == read_manifest(tmp_path / "b")


def test_pictures_are_not_codes(tmp_path):
    write_codes(tmp_path, sources={"npm": "1"})
    with pytest.raises(DataError, match="mmwudao tokenize"):
        list(read_codes(tmp_path, "train"))


def test_a_split_that_is_not_there(tmp_path):
    write_codes(tmp_path)
    with pytest.raises(DataError, match="no split 'test'; it has train"):
        list(read_codes(tmp_path, "test"))


@pytest.mark.parametrize("keep", [0, 100, 512 + 100, 3 * 512, 4 * 512, 4 * 512 + 100, 7 * 512])
def test_a_shard_of_codes_cut_short_is_an_error(tmp_path, keep):
    write_codes(tmp_path, count=2)
    path = tmp_path / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="damaged") as error:
        list(read_codes(tmp_path, "train"))
    assert path.name in one_line(error)


def test_a_missing_shard_of_codes_is_an_error(tmp_path):
    write_codes(tmp_path)
    (tmp_path / "train-00001.tar").unlink()
    with pytest.raises(DataError, match="train-00001.tar"):
        list(read_codes(tmp_path, "train"))


@pytest.mark.parametrize("content", [b"", b"codes", b"\x93NUMPY\x01\x00"])
def test_a_member_that_is_no_array_is_an_error(tmp_path, content):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write_members("a", {"npy": content, "json": sample(1).to_members()["json"]})
    write_manifest(tmp_path, Manifest("emoji", 16, {"train": writer.shards}, {"tokenizer": "cafe"}))
    with pytest.raises(DataError, match="sample a"):
        list(read_codes(tmp_path, "train"))


def test_arrays_that_need_pickle_are_refused(tmp_path):
    buffer = io.BytesIO()
    numpy.save(buffer, numpy.array([{}], dtype=object), allow_pickle=True)
    test_a_member_that_is_no_array_is_an_error(tmp_path, buffer.getvalue())


def test_shard_info_is_what_the_manifest_says(tmp_path):
    (shard,) = write(tmp_path, [sample(0)])
    assert shard == ShardInfo("train-00000.tar", 1, shard.bytes, file_sha256(tmp_path / "train-00000.tar"))
