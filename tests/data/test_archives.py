"""Plain tar files are read by the places of their members: what webdataset reads, byte for byte."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from webdataset.tariterators import tarfile_samples

from data.archives import plain_samples, read_plain

MEMBERS = {
    "a.png": b"picture", "a.txt": b"", "A.PNG": b"other", "b/ä.v2.TXT": b"x" * 700, "b/ä.json": b"{}", "none": b"n",
    "__meta__": b"m", "__MACOSX__/a.png": b"m", "c.png": b"z" * 512, "a.jpg": b"again",
}  # fmt: skip


def write(path: Path, members: dict[str, bytes], kind: int = tarfile.USTAR_FORMAT, **fields: object) -> Path:
    with tarfile.open(path, "w", format=kind, encoding="utf-8") as tar:
        folder = tarfile.TarInfo("b")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            for field, value in fields.items():
                setattr(entry, field, value)
            tar.addfile(entry, io.BytesIO(content))
    return path


def by_webdataset(shard: Path) -> list[tuple[str, dict[str, bytes]]]:
    found = tarfile_samples([{"url": str(shard)}])
    return [(one["__key__"], {name: one[name] for name in one if not name.startswith("__")}) for one in found]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_plain_files_as_webdataset_groups_them(tmp_path, kind):
    shard = write(tmp_path / "0.tar", MEMBERS | {f"{'f' * 60}/{'g' * 30}.png": b"p"}, kind)
    plain = plain_samples(shard, [])
    assert plain is not None
    assert list(read_plain(shard, plain)) == by_webdataset(shard)
    assert [key for key, _ in plain] == ["a", "A", "b/ä", "c", "a", f"{'f' * 60}/{'g' * 30}"]


def test_a_prefix_is_part_of_the_name(tmp_path):
    name = f"{'folder/' * 20}a.png"
    shard = write(tmp_path / "0.tar", {name: b"p"})
    plain = plain_samples(shard, [])
    assert plain is not None
    assert list(read_plain(shard, plain)) == by_webdataset(shard) == [(name.removesuffix(".png"), {"png": b"p"})]


@pytest.mark.parametrize(
    ("members", "kind", "fields"),
    [
        ({"a" * 200 + ".png": b""}, tarfile.GNU_FORMAT, {}),  # a long name
        ({"ä.png": b""}, tarfile.PAX_FORMAT, {}),
        ({"a.png": b""}, tarfile.PAX_FORMAT, {"mtime": 1.5}),
        ({"a.png": b"", "A.png": b""}, tarfile.USTAR_FORMAT, {"type": tarfile.SYMTYPE, "linkname": "b"}),
        ({"a.png": b"", "a.PNG": b""}, tarfile.USTAR_FORMAT, {}),  # one member twice
        ({"a.__key__": b""}, tarfile.USTAR_FORMAT, {}),
    ],
)
def test_what_is_not_plain_is_left_to_webdataset(tmp_path, members, kind, fields):
    assert plain_samples(write(tmp_path / "0.tar", members, kind, **fields), []) is None


def test_damage_is_left_to_webdataset(tmp_path):
    whole = write(tmp_path / "0.tar", MEMBERS).read_bytes()
    shard = tmp_path / "1.tar"
    for content in (
        b"",
        whole[:512],
        whole[:1500],
        whole[:-10_240],
        b"\x1f\x8b" + whole,
        whole.replace(b"ustar", b"usual"),
    ):
        shard.write_bytes(content)
        assert plain_samples(shard, []) is None
    shard.write_bytes(bytes(10_240))
    assert plain_samples(shard, []) == []


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    shard = write(tmp_path / "0.tar", MEMBERS)
    plain = plain_samples(shard, [])
    assert plain is not None
    os.truncate(shard, 1600)
    with pytest.raises(OSError, match="unexpected end of data"):
        list(read_plain(shard, plain))
