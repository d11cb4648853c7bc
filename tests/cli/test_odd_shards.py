"""`embed`, `index build` and `search` of shards as users have them; where nothing is stored, nothing is left."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image

from mmwudao.cli.app import run
from tests.helpers.cli import one_error
from tests.helpers.tiny_towers import ColourTowers


@pytest.fixture(autouse=True)
def towers(monkeypatch):
    monkeypatch.setattr("mmwudao.loading.towers.load_model_towers", lambda *_: ColourTowers())


def picture(colour="red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, members: dict[str, bytes], mode: Literal["w", "w:gz"] = "w") -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def built(capsys, *arguments) -> dict[str, object]:
    assert run(["index", "build", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def found(capsys, place, text="red") -> dict[str, dict[str, object]]:
    assert run(["search", str(place), text, "--json"]) == 0
    hits = map(json.loads, capsys.readouterr().out.splitlines())
    return {hit["id"]: hit["metadata"] for hit in hits}


def test_odd_samples_do_not_stop_a_build(tmp_path, capsys):
    records: list[dict[str, object]] = [{"source": 5}, {"licence": ["cc0", 1]}, {"family": {"a": 1}}, {"concept": True}]
    records += [{"source": float("nan")}]
    records += [{"key": ["a"]}, {"id": {"a": 1}}, {"url": 7}, {"source": "half \ud83d"}, {"id": "k" * 600}]
    members = {"bad.png": picture(), "bad.json": b'{"caption": "\\ud83d"}', "deep.png": picture()}
    members["deep.json"] = b"[" * 100_000
    for k, record in enumerate(records):
        members |= {f"{k}.png": picture(), f"{k}.json": json.dumps({"caption": "red", **record}).encode()}
    shard = write_shard(tmp_path / "shards" / "00000.tar", members)
    assert built(capsys, shard, "--collection", tmp_path / "c")["added"] == len(records)
    hits = found(capsys, tmp_path / "c")
    assert hits["0"]["source"] == "5"
    assert hits["1"]["licence"] == '["cc0", 1]'


def test_keys_that_begin_anew_in_each_shard(tmp_path, capsys):
    shards = tmp_path / "shards"
    first = {"a.png": picture("red"), "a.txt": b"red", "b.png": picture("blue"), "b.txt": b"b"}
    write_shard(shards / "0.v1.tar", first)
    write_shard(shards / "0.v2.tar.gz", {"a.png": picture("green"), "a.txt": b"green"}, "w:gz")
    assert built(capsys, shards, "--collection", tmp_path / "c", "--kind", "all")["added"] == 6
    hits = found(capsys, tmp_path / "c")
    assert set(hits) == {"0.v1/a", "0.v2/a", "b", "0.v1/a:und", "0.v2/a:und", "b:und"}
    sheet = tmp_path / "sheet.png"
    assert run(["search", str(tmp_path / "c"), "red", "--where", "kind = 'image'", "--sheet", str(sheet)]) == 0
    with Image.open(sheet) as image:
        assert image.convert("RGB").getpixel((60, 60)) == (255, 0, 0)


def test_one_id_twice_in_a_shard(tmp_path, capsys):
    members: dict[str, bytes] = {}
    for k in range(2):
        members |= {f"{k}.png": picture(), f"{k}.json": b'{"id": "same", "caption": "red"}'}
    shard = write_shard(tmp_path / "shards" / "0.tar", members)
    assert run(["embed", str(shard), "-o", str(tmp_path / "v"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["skipped"]) == (1, {"id given twice in a shard": 1})
    assert "sample same" in (tmp_path / "v" / "skipped.log").read_text()


def test_pictures_without_captions(tmp_path, capsys):
    shard = write_shard(tmp_path / "shards" / "0.tar", {"a.png": picture(), "b.png": picture("blue"), "b.txt": b"blue"})
    assert built(capsys, shard, "--collection", tmp_path / "images")["added"] == 2
    assert built(capsys, shard, "--collection", tmp_path / "texts", "--kind", "text")["added"] == 1
    assert run(["embed", str(shard), "-o", str(tmp_path / "v"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["texts"], report["skipped"]) == (2, 1, {})


@pytest.mark.parametrize("content", [b"PAR1 no tar", b"", bytes(10240)])
def test_nothing_stored_is_an_error_and_leaves_nothing(content, tmp_path, capsys):
    source = tmp_path / "00000.parquet"
    source.write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    assert run(["index", "build", str(source), "--collection", str(tmp_path / "c")]) == 2
    assert "nothing to embed" in one_error(capsys)
    assert run(["embed", str(source), "-o", str(tmp_path / "v")]) == 2
    assert "nothing to embed" in one_error(capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_captions_to_store(tmp_path, capsys):
    shard = write_shard(tmp_path / "shards" / "0.tar", {"a.png": picture()})
    assert run(["embed", str(shard), "--images", "-o", str(tmp_path / "v")]) == 0
    capsys.readouterr()
    assert run(["index", "build", str(tmp_path / "v"), "--collection", str(tmp_path / "c"), "--kind", "text"]) == 2
    assert "hold no captions" in one_error(capsys)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_ids_from_a_file_with_a_byte_order_mark(encoding, tmp_path, capsys):
    shard = write_shard(tmp_path / "shards" / "0.tar", {"ä.png": picture(), "b.png": picture("blue")})
    built(capsys, shard, "--collection", tmp_path / "c")
    (tmp_path / "ids.txt").write_bytes("ä\r\nb\r\n".encode(encoding))
    assert run(["index", "delete", "--collection", str(tmp_path / "c"), "--ids-file", str(tmp_path / "ids.txt")]) == 0
    assert capsys.readouterr().out.startswith("2 of 2 items")
