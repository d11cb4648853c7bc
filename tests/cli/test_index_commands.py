"""`index` and `search`: from shards or vectors to what is found, and one line for whatever is wrong."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from data.shards import ShardWriter
from mmwudao.cli.app import run
from retrieval.collections.opening import open_collection
from retrieval.vectors.embed import embed_shards
from tests.helpers.tiny_towers import COLOURS, ColourTowers, colour_sample


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setattr("mmwudao.loading.towers.load_model_towers", lambda *_: ColourTowers())
    with ShardWriter(tmp_path / "shards", "train", len(COLOURS)) as writer:
        for k, family in enumerate(("noto", "twemoji")):
            for name in COLOURS:
                writer.write(colour_sample(name, family, shade=k))
    return tmp_path / "shards"


@pytest.fixture
def place(shards, tmp_path, capsys):
    assert run(["index", "build", str(shards), "--collection", str(tmp_path / "c")]) == 0
    assert capsys.readouterr().out.startswith("16 items")
    return tmp_path / "c"


def test_search_by_text_picture_and_filter(place, tmp_path, capsys):
    assert run(["search", str(place), "something red", "-k", "2", "--json"]) == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {hit["id"] for hit in hits} == {"noto-red", "twemoji-red"}
    assert hits[0]["metadata"]["caption_de"] == "Quadrat, rot"
    assert hits[0]["metadata"]["kind"] == "image"
    Image.new("RGB", (20, 10), "yellow").save(tmp_path / "yellow.png")
    sheet = tmp_path / "out.png"
    command = ["search", str(place), "--image", str(tmp_path / "yellow.png"), "-k", "3", "--sheet", str(sheet)]
    assert run([*command, "--where", "family = 'twemoji'"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "twemoji-yellow" in lines[0]
    assert "(twemoji)" in lines[2]
    with Image.open(sheet) as picture:
        assert picture.convert("RGB").getpixel((60, 60)) == (254, 254, 1)


def test_from_vectors_with_captions_too(shards, tmp_path, capsys):
    embed_shards(ColourTowers(), shards, tmp_path / "vectors")
    command = [str(tmp_path / "vectors"), "--collection", str(tmp_path / "c"), "--json"]
    assert run(["index", "build", *command, "--kind", "text"]) == 0
    assert json.loads(capsys.readouterr().out)["added"] == 32
    assert run(["index", "add", *command, "--kind", "all"]) == 2
    assert "32 ids are stored already" in capsys.readouterr().err
    assert run(["index", "add", *command, "--kind", "all", "--replace"]) == 0
    capsys.readouterr()
    with open_collection(tmp_path / "c") as collection:
        assert (collection.count(), collection.count("kind = 'text' AND language = 'de'")) == (48, 16)
        assert collection.get(["noto-red:de"])[0].metadata["text"] == "Quadrat, rot"
    # vectors do not know where the shards lie
    search = ["search", str(tmp_path / "c"), "red", "--sheet", str(tmp_path / "s.png"), "--where", "kind = 'text'"]
    assert run(search) == 2
    assert "give --shards" in capsys.readouterr().err
    assert run([*search, "--shards", str(shards)]) == 0
    assert (tmp_path / "s.png").is_file()


def test_delete_check_and_optimise(place, tmp_path, capsys):
    (tmp_path / "ids").write_text("noto-red\nnoto-blue\nnothing\n")
    command = ["--collection", str(place), "--json"]
    assert run(["index", "delete", "noto-red", "--ids-file", str(tmp_path / "ids"), *command]) == 0
    assert json.loads(capsys.readouterr().out)["deleted"] == 2
    assert run(["index", "optimise", *command]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == 14
    assert run(["index", "check", "-k", "3", *command]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["recall"], record["queries"], record["items"], record["dim"]) == (1.0, 14, 14, 8)


def test_snapshots_are_made_restored_and_dropped(place, capsys):
    command = ["index", "snapshots", "--collection", str(place)]
    assert run(command) == 0
    assert capsys.readouterr().out == "no snapshots\n"
    assert run([*command, "--make", "before", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["snapshots"] == ["before"]
    assert run(["index", "delete", "noto-red", "--collection", str(place)]) == 0
    assert run([*command, "--restore", "before"]) == 0
    with open_collection(place) as collection:
        assert collection.count() == 16
    capsys.readouterr()
    assert run([*command, "--drop", "before"]) == 0
    assert capsys.readouterr().out == "no snapshots\n"


def test_one_line_for_whatever_is_wrong(place, shards, tmp_path, capsys, monkeypatch):
    embed_shards(ColourTowers(), shards, tmp_path / "vectors")
    (tmp_path / "vectors" / "train-00001.parquet").write_bytes(b"PAR1 no more")
    cases = [
        (["index", "build", str(shards), "--collection", str(place)], "holds items"),
        (["index", "add", str(shards), "--collection", str(tmp_path / "none")], "no collection at"),
        (["index", "add", str(tmp_path / "none"), "--collection", str(place)], "no shard or folder"),
        (["index", "add", str(shards), "--collection", str(place), "--kind", "sound"], "image, text, all"),
        (["index", "build", str(tmp_path / "vectors"), "--collection", str(tmp_path / "d")], "is damaged"),
        (["index", "delete", "--collection", str(place)], "no id"),
        (["index", "check", "--collection", str(place), "--queries", "0"], "at least one query"),
        (["index", "snapshots", "--collection", str(place), "--drop", "a"], "no snapshot 'a'; there are: none"),
        (["index", "snapshots", "--collection", str(place), "--make", "a", "--drop", "b"], "give one of --make"),
        (["search", str(place)], "give a text or --image"),
        (["search", str(place), "  "], "an empty text"),
        (["search", str(place), "red", "-k", "0"], "returns 1 to 10000"),
        (["search", str(place), "red", "--where", "colour = 1"], "no column 'colour'"),
        (["search", str(place), "red", "--where", "family = 'x') OR (family = 'noto'"], 'cannot read ") OR'),
        (["search", str(place), "--image", str(tmp_path / "none.png")], "no picture at"),
        (["search", str(place), "red", "--where", "family = 'x'", "--sheet", f"{tmp_path}/s.png"], "returned nothing"),
    ]
    for command, problem in cases:
        assert run(command) == 2, command
        error = capsys.readouterr().err
        assert problem in error
        assert error.count("\n") == 1
    other = ColourTowers()
    other.project.weight.data.zero_()
    monkeypatch.setattr("mmwudao.loading.towers.load_model_towers", lambda *_: other)
    assert run(["search", str(place), "red"]) == 2
    assert "other towers" in capsys.readouterr().err
    assert run(["index", "add", str(shards), "--collection", str(place)]) == 2
    assert "other towers" in capsys.readouterr().err
