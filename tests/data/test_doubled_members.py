"""Two pictures or two captions in one sample: nobody says which is meant, so it is skipped and named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from data.pack import PackSettings, pack_samples
from data.reading import DOUBLED_MEMBER, SkipLog, open_shards
from data.sample import DataError
from data.shard_index import ShuffledShards


def picture(kind: str, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, kind)
    return buffer.getvalue()


GOOD = [("good.png", picture("PNG")), ("good.txt", b"a thing")]
OURS = json.dumps({"captions": {"en": {"name": "a cat", "others": ["a tabby"]}}}).encode()
DOUBLED = {
    "two pictures": ([("bad.jpg", picture("JPEG")), ("bad.png", picture("PNG")), ("bad.txt", b"a cat")],
                     "two pictures, .png and .jpg"),
    "two suffixes of JPEG": ([("bad.jpeg", picture("JPEG")), ("bad.jpg", picture("JPEG")), ("bad.txt", b"a cat")],
                             "two pictures, .jpg and .jpeg"),
    "capitals": ([("bad.JPG", picture("JPEG")), ("bad.jpg", picture("JPEG", "blue")), ("bad.txt", b"a cat")],
                 "bad"),
    "one name twice": ([("bad.png", picture("PNG")), ("bad.png", picture("PNG", "blue")), ("bad.txt", b"a cat")],
                       "is twice in the shard"),
    "two texts": ([("bad.png", picture("PNG")), ("bad.txt", b"a cat"), ("bad.txt", b"a dog")],
                  "is twice in the shard"),
    "two kinds of text": ([("bad.json", OURS), ("bad.png", picture("PNG")), ("bad.txt", b"a dog")],
                          "its .json and its .txt hold captions that differ"),
}  # fmt: skip


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("name", list(DOUBLED))
def test_a_doubled_member_is_skipped_by_name(name: str, suffix: str, tmp_path: Path) -> None:
    members, problem = DOUBLED[name]
    made = shard(tmp_path / f"train-00000{suffix}", [*members, *GOOD])
    log = SkipLog(tmp_path / "skipped.log")
    examples = list(open_shards(made, log=log))
    assert [example.sample.id for example in examples] == ["good"]
    assert log.counts == {DOUBLED_MEMBER: 1}
    reason, place, said = (tmp_path / "skipped.log").read_text().strip().split("\t")
    assert (reason, place) == (DOUBLED_MEMBER, f"train-00000{suffix}: sample bad")
    assert problem in said
    with pytest.raises(DataError, match=f"sample bad: .*{problem}"):
        list(open_shards(made, strict=True))


@pytest.mark.parametrize("name", list(DOUBLED))
def test_a_doubled_member_in_a_training(name: str, tmp_path: Path) -> None:
    made = shard(tmp_path / "train-00000.tar", [*DOUBLED[name][0], *GOOD])
    log = SkipLog()
    shards = ShuffledShards([made], log=log)
    assert {shards.at(place).sample.id for place in range(4)} == {"good"}
    assert log.counts.keys() == {DOUBLED_MEMBER}


def test_two_captions_that_agree_are_one(tmp_path: Path) -> None:
    members = [("a.json", OURS), ("a.png", picture("PNG")), ("a.txt", b" a tabby\n")]
    (example,) = open_shards(shard(tmp_path / "train-00000.tar", members), strict=True)
    assert example.sample.captions["en"].name == "a cat"
    # as img2dataset writes it, or as people write better captions into it
    members[0] = ("a.json", json.dumps({"caption": "IMG_4711"}).encode())
    (example,) = open_shards(shard(tmp_path / "train-00001.tar", members), strict=True)
    assert example.sample.captions["und"].name == "a tabby"


def test_folders(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, content in (*GOOD, *DOUBLED["two kinds of text"][0], ("good.TXT", b"another thing")):
        (folder / name).write_bytes(content)
    capitals = len(list(folder.glob("good.*"))) == 3  # else the file system takes both names for one
    manifest = pack_samples(folder, tmp_path / "out")
    assert manifest.samples("train") == 1
    assert manifest.skipped == {DOUBLED_MEMBER: 1} | ({"no picture file": 1} if capitals else {})
    with pytest.raises(DataError, match="captions that differ"):
        pack_samples(folder, tmp_path / "strict", PackSettings(strict=True))
