"""Whatever ids samples have, shards hold all of them, and a sample of codes by a damaged file is one line."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy
import pytest
from PIL import Image

from data.codes import CodedSample, read_array, read_codes
from data.reading import read_shard
from data.sample import Caption, DataError, Sample
from data.shard_index import ShuffledShards
from data.shards import Manifest, ShardWriter, write_manifest
from mmwudao.tokenizing import read_code_file

IDS = [
    "a.b", "a_b", "a", "a", "a/", "a//", ".", "..", "../x", "/abs/x", "x" * 300, "x" * 299, "é" * 200, "日/" * 60,
    "https://example.org/cat/", "__MACOSX__/a", "__a__/", "__x__", "a b\nc", "._a", ".DS_Store", "0",
]  # fmt: skip


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_id_comes_back(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train") as writer:
        for name in IDS:
            writer.write(Sample(name, png(), "png", {"en": Caption("a thing")}))
    shard = tmp_path / "train-00000.tar"
    assert [one.id for one in read_shard(shard, lambda *skip: pytest.fail(str(skip)))] == IDS
    shards = ShuffledShards([shard])
    assert [shards.at(place).sample.id for place in range(len(IDS))] == IDS
    with tarfile.open(shard) as tar:
        assert max(len(name.encode()) for name in tar.getnames()) <= 100


def test_codes_of_every_id_come_back(tmp_path: Path) -> None:
    codes = numpy.zeros((2, 2), numpy.uint16)
    with ShardWriter(tmp_path, "train") as writer:
        for name in IDS:
            sample = Sample(name, None, "", {"en": Caption("a thing")})
            writer.write_members(name, CodedSample(sample, codes, codes[None]).to_members())
    write_manifest(tmp_path, Manifest("codes", 16, {"train": writer.shards}, {"tokenizer": "x"}))
    found = list(read_codes(tmp_path, "train"))
    assert [one.sample.id for one in found] == IDS
    assert all(one.views is not None for one in found)


def test_a_sample_without_its_codes_is_one_line(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train") as writer:
        writer.write_members("a", {"json": b"{}"})
    write_manifest(tmp_path, Manifest("codes", 16, {"train": writer.shards}, {"tokenizer": "x"}))
    with pytest.raises(DataError, match="sample a has no .npy: make the codes again"):
        list(read_codes(tmp_path, "train"))


def broken_arrays() -> dict[str, bytes]:
    buffer, archive = io.BytesIO(), io.BytesIO()
    numpy.save(buffer, numpy.zeros((2, 2), numpy.int64))
    numpy.savez(archive, codes=numpy.zeros((2, 2), numpy.int64))
    whole = buffer.getvalue()
    return {
        "empty": b"", "text": b"no codes", "archive": archive.getvalue(), "cut": whole[:-5], "cut header": whole[:20],
        "brackets": whole.replace(b"(2, 2), }  ", b"((((((((((("),
        "huge": whole.replace(b"(2, 2), }" + 10 * b" ", b"(99999999999999,2)}"),
        "negative": whole.replace(b"(2, 2)", b"(-2,2)"), "type": whole.replace(b"<i8", b"xx8"),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(broken_arrays()))
def test_a_file_that_holds_no_codes_is_one_line(name: str, tmp_path: Path) -> None:
    content = broken_arrays()[name]
    with pytest.raises(DataError, match=r"(?s)^sample a is no array of codes \([^\n]+\)$"):
        read_array(content, "sample a")
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(DataError, match="a.npy is no array of codes"):
        read_code_file(tmp_path / "a.npy")
