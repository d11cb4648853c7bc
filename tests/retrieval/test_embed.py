"""Vectors out: right, resumable after a kill at any moment, and open about what was skipped."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data.images import open_image
from data.reading import open_shards
from data.sample import DataError, Sample
from data.shards import ShardWriter
from mmwudao.cli.app import run
from retrieval.vectors.embed import embed_shards
from retrieval.vectors.settings import EmbedSettings
from tests.helpers.tiny_towers import ColourTowers, colour_sample, write_shards


def rows(out):
    """All rows of the visible parts, in order of the parts."""
    return [row for part in sorted(out.glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_are_what_the_towers_say(tmp_path, dtype):
    shards, towers = write_shards(tmp_path / "shards"), ColourTowers()
    report = embed_shards(towers, shards, tmp_path / "out", EmbedSettings(dtype=dtype, batch_size=3))
    assert (report.images, report.texts, report.parts, report.found, report.skipped) == (32, 64, 4, 0, {})
    table = pq.read_table(tmp_path / "out" / "train-00001.parquet")
    assert table.schema.field("vector").type == pa.list_(pa.float32() if dtype == "float32" else pa.float16(), 8)
    assert table.schema.metadata[b"split"] == b"train"
    parts = [str(part) for part in (tmp_path / "out").glob("*.parquet")]
    assert pq.read_table(parts, filters=[("kind", "=", "image")]).num_rows == 32
    found = {(row["kind"], row["id"], row["language"]): row for row in rows(tmp_path / "out")}
    assert len(found) == 96
    for sample, _ in open_shards(shards):
        row = found["image", sample.id, None]
        assert (row["family"], row["concept"], row["text"]) == (sample.family, sample.concept, None)
        assert dict(row["captions"]) == {name: caption.name for name, caption in sample.captions.items()}
        expected = towers.encode_image([open_image(sample.require_image())])[0]
        torch.testing.assert_close(torch.tensor(row["vector"]).float(), expected, atol=1e-3, rtol=0)
        for language, caption in sample.captions.items():
            row = found["text", sample.id, language]
            assert row["text"] == caption.name
            expected = towers.encode_text([caption.name])[0]
            torch.testing.assert_close(torch.tensor(row["vector"]).float(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_one_kind_alone(tmp_path, kind):
    shards = write_shards(tmp_path / "shards", ["a"], corrupt=True)
    settings = EmbedSettings(images=kind == "image", texts=kind == "text")
    report = embed_shards(ColourTowers(), shards, tmp_path / "out", settings)
    assert {row["kind"] for row in rows(tmp_path / "out")} == {kind}
    # without pictures, none is opened
    assert (report.images, report.texts) == ((8, 0) if kind == "image" else (0, 18))


def test_a_corrupt_sample_is_skipped_and_named(tmp_path, caplog):
    shards = write_shards(tmp_path / "shards", ["a", "b"], corrupt=True)
    report = embed_shards(ColourTowers(), shards, tmp_path / "out")
    assert report.skipped == {"corrupt image": 2}
    assert not [row for row in rows(tmp_path / "out") if "broken" in row["id"]]
    lines = (tmp_path / "out" / "skipped.log").read_text().splitlines()
    assert [line.split("\t")[:2] for line in lines] == [
        ["corrupt image", "train-00000.tar: sample a-broken"], ["corrupt image", "train-00001.tar: sample b-broken"]
    ]  # fmt: skip
    assert "a-broken" in caplog.text
    # the next run finds all parts and says the same
    assert embed_shards(ColourTowers(), shards, tmp_path / "out").skipped == {"corrupt image": 2}
    assert (tmp_path / "out" / "skipped.log").read_text().splitlines() == lines


def test_a_shard_without_a_readable_sample_has_an_empty_part(tmp_path):
    with ShardWriter(tmp_path / "shards", "train") as writer:
        writer.write(Sample("x", b"no picture", "png", colour_sample("red", "a").captions))
    with pytest.raises(DataError, match="nothing to embed"):
        embed_shards(ColourTowers(), tmp_path / "shards", tmp_path / "nothing")
    with ShardWriter(tmp_path / "shards", "test") as writer:
        writer.write(colour_sample("red", "a"))
    report = embed_shards(ColourTowers(), tmp_path / "shards", tmp_path / "out")
    assert report.images == 1
    assert report.skipped == {"corrupt image": 1}
    assert pq.read_table(tmp_path / "out" / "train-00000.parquet").num_rows == 0


def test_pictures_are_decoded_while_the_towers_work(tmp_path):
    """The first batch stays with the towers until a picture of the next one is decoded."""
    shards, decoded, met = write_shards(tmp_path / "shards"), [], threading.Event()

    class Waiting(ColourTowers):
        def preprocess(self, image):
            decoded.append(image)
            if len(decoded) > 4:
                met.set()
            return super().preprocess(image)

        def encode_pixels(self, pixels):
            assert met.wait(120)
            return super().encode_pixels(pixels)

    embed_shards(Waiting(), shards, tmp_path / "out", EmbedSettings(texts=False, batch_size=4, workers=2))
    assert len(decoded) == 32


class SlowTowers(ColourTowers):
    def encode_pixels(self, pixels):
        time.sleep(0.01)
        return super().encode_pixels(pixels)


def embed_slowly(shards, out):
    embed_shards(SlowTowers(), shards, out, EmbedSettings(batch_size=2, workers=2))


def test_kill_at_any_moment_loses_and_doubles_nothing(tmp_path):
    shards = write_shards(tmp_path / "shards", [f"f{k:02}" for k in range(12)], corrupt=True)
    started = time.monotonic()
    embed_slowly(shards, tmp_path / "whole")
    one_part = (time.monotonic() - started) / 12
    context = multiprocessing.get_context("forkserver")  # one slow start for all the children
    context.set_forkserver_preload(["torch", "pyarrow.parquet", "retrieval.vectors.embed"])
    out, draw, seen = tmp_path / "out", random.Random(0), [0]
    for more in (0, 1, 3, 0, 2, 1):  # parts that the run is given time for
        child = context.Process(target=embed_slowly, args=(shards, out))
        child.start()
        while child.is_alive() and len(list(out.glob("*.parquet"))) < seen[-1] + more:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 1.5 * one_part))
        child.kill()
        child.join()
        for part in out.glob("*.parquet"):
            pq.read_table(part)  # whole, always
        seen.append(len(list(out.glob("*.parquet"))))
    assert seen == sorted(seen)
    assert len({count for count in seen if 0 < count < 12}) >= 2, "killed in the middle more than once"
    report = embed_shards(SlowTowers(), shards, out, EmbedSettings(batch_size=2))
    assert report.found == seen[-1]
    assert rows(out) == rows(tmp_path / "whole")
    for name in ("skipped.log", "settings.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert report.skipped == {"corrupt image": 12}
    assert not list(out.glob(".*.tmp")), "what a kill left was written over"


@pytest.mark.parametrize("crash", range(1, 5))
def test_a_stop_before_each_rename(tmp_path, monkeypatch, crash):
    shards = write_shards(tmp_path / "shards", ["a", "b"])
    embed_shards(ColourTowers(), shards, tmp_path / "whole")
    calls = []

    def replace(source, target):
        calls.append(target)
        if len(calls) == crash:
            raise KeyboardInterrupt
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            embed_shards(ColourTowers(), shards, tmp_path / "out")
    embed_shards(ColourTowers(), shards, tmp_path / "out")
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")


def test_other_settings_are_refused(tmp_path):
    shards, out = write_shards(tmp_path / "shards", ["a"]), tmp_path / "out"
    embed_shards(ColourTowers(), shards, out)
    other = ColourTowers()
    torch.nn.init.zeros_(other.project.weight)
    for towers, options, name in (
        (other, {}, "towers"),
        (ColourTowers(), {"dtype": "float16"}, "dtype"),
        (ColourTowers(), {"texts": False}, "texts"),
    ):
        with pytest.raises(DataError, match=rf"other settings \({name} differ\): choose another folder$"):
            embed_shards(towers, shards, out, EmbedSettings(**options))
    with pytest.raises(DataError, match="shards differ"):
        embed_shards(ColourTowers(), write_shards(tmp_path / "more", ["a", "b"]), out)
    (out / "settings.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        embed_shards(ColourTowers(), shards, out)


def test_bad_calls_are_one_line(tmp_path):
    shards = write_shards(tmp_path / "shards", ["a"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    for out, options, problem in (
        ("full", {}, "holds other files"),
        ("out", {"dtype": "int8"}, "float32 or float16"),
        ("out", {"images": False, "texts": False}, "nothing to embed"),
        ("out", {"batch_size": 0}, "batch_size must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=problem):
            embed_shards(ColourTowers(), shards, tmp_path / out, EmbedSettings(**options))
    with pytest.raises(DataError, match="same name"):
        embed_shards(ColourTowers(), [shards, write_shards(tmp_path / "twin", ["a"])], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mmwudao.loading.towers.load_model_towers", lambda *_: ColourTowers())
    shards = write_shards(tmp_path / "shards", ["a"])
    command = ["embed", str(shards), "--out", str(tmp_path / "out")]
    assert run([*command, "--images"]) == 0
    assert "8 pictures" in capsys.readouterr().out
    assert run([*command, "--images", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["found"] == 1
    assert run(command) == 2
    assert capsys.readouterr().err.count("\n") == 1
