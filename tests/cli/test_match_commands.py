"""`--by generator`: embed, index, search and eval by a generator's own vectors, and one line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data.shards import ShardWriter
from mmwudao.cli.app import run
from mmwudao.loading.vectors import load_vector_maker
from retrieval.towers.base import save_towers
from tests.helpers.cli import one_error
from tests.helpers.tiny_towers import COLOURS, ColourTowers, colour_sample, tiny_towers
from vqvae.storage.parts import content_hash


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matched") / "shards"
    with ShardWriter(folder, "test", len(COLOURS)) as writer:
        for name in COLOURS:
            writer.write(colour_sample(name, "noto"))
    return folder


@pytest.fixture(scope="module")
def place(shards: Path, matching_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("built") / "c")
    by = ["--model", str(matching_model_dir), "--by", "generator", "--device", "cpu"]
    assert run(["index", "build", str(shards), "--collection", folder, "--kind", "all", *by]) == 0
    return folder


def test_embed_writes_the_vectors_of_the_generator(shards, matching_model_dir, tmp_path, capsys):
    by = ["--model", str(matching_model_dir), "--by", "generator", "--device", "cpu"]
    assert run(["embed", str(shards), "-o", str(tmp_path / "vectors"), *by, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == len(COLOURS)
    (part,) = (tmp_path / "vectors").glob("*.parquet")
    rows = pq.read_table(part).to_pylist()
    towers = load_vector_maker("generator", matching_model_dir, "cpu")
    settings = json.loads((tmp_path / "vectors" / "settings.json").read_text())
    assert (settings["towers"], settings["embed_dim"]) == (content_hash(towers), 8)
    texts = [row for row in rows if row["kind"] == "text"]
    found = torch.tensor([row["vector"] for row in texts])
    torch.testing.assert_close(found, towers.encode_text([row["text"] for row in texts]), atol=1e-5, rtol=1e-5)


def test_search_and_add_by_the_generator(place, shards, matching_model_dir, tmp_path, capsys):
    by = ["--model", str(matching_model_dir), "--by", "generator", "--device", "cpu"]
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    assert run(["search", place, str(tmp_path / "red.png"), "-k", "3", "--json", *by]) == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(hits) == 3
    assert hits[0]["score"] >= hits[1]["score"]
    caption = colour_sample("red", "noto").captions["de"].name
    assert run(["search", place, caption, "-k", "1", "--where", "kind = 'text'", "--json", *by]) == 0
    (hit,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert hit["metadata"]["text"] == caption
    assert hit["score"] == pytest.approx(1, abs=1e-4)
    assert run(["index", "add", str(shards), "--collection", place, "--replace", *by]) == 0
    assert capsys.readouterr().out.startswith(f"{len(COLOURS)} items stored")


def test_other_vectors_are_refused_with_both_hashes(place, shards, matching_model_dir, tmp_path, capsys):
    folder = str(save_towers(tiny_towers(), tmp_path / "towers"))
    loaded = load_vector_maker("towers", folder, "cpu")
    own = content_hash(load_vector_maker("generator", matching_model_dir, "cpu"))
    for command in (["search", place, "red"], ["index", "add", str(shards), "--collection", place, "--replace"]):
        capsys.readouterr()
        assert run([*command, "--model", folder, "--device", "cpu"]) == 2
        error = one_error(capsys)
        assert f"other towers ({own[:12]}, not {content_hash(loaded)[:12]})" in error
        assert "(--by)" in error


def test_a_folder_of_pictures_remembers_what_made_its_vectors(matching_model_dir, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for name in ("red", "green", "blue"):
        Image.new("RGB", (40, 30), name).save(tmp_path / "photos" / f"{name}.png")
    build = ["index", "build", str(tmp_path / "photos"), "--collection", str(tmp_path / "c"), "--device", "cpu"]
    by = ["--model", str(matching_model_dir), "--by", "generator"]
    assert run([*build, *by]) == 0
    capsys.readouterr()
    # neither the model nor the way is named
    assert run(["search", str(tmp_path / "c"), str(tmp_path / "photos" / "red.png"), "-k", "1", "--paths"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert run(["search", "--collection", str(tmp_path / "c"), "red", "--update"]) == 0
    capsys.readouterr()
    Image.new("RGB", (40, 30), "white").save(tmp_path / "photos" / "white.png")
    folder = str(save_towers(tiny_towers(), tmp_path / "towers"))
    assert run([*build, "--model", folder]) == 2
    error = one_error(capsys)
    assert "other towers (" in error
    assert "--rebuild" in error


def test_eval_measures_the_generator(shards, matching_model_dir, tmp_path, capsys):
    command = ["eval", "retrieval", str(matching_model_dir), str(shards), "-o", str(tmp_path / "out"), "--json"]
    assert run([*command, "--by", "generator", "--device", "cpu"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["kind"], record["embed_dim"]) == ("generator", 8)
    assert "recall@10" in record["splits"]["test"]["mean"]["text_to_image"]


@pytest.mark.usefixtures("loggers_as_they_were")
@pytest.mark.parametrize("command", ["embed", "index", "search", "eval", "serve"])
def test_a_model_that_only_draws_is_refused_in_one_line(command, place, shards, tiny_model_dir, tmp_path, capsys):
    capsys.readouterr()
    model, out = str(tiny_model_dir), str(tmp_path / "new")
    commands = {
        "embed": ["embed", str(shards), "-o", out, "--model", model],
        "index": ["index", "build", str(shards), "--collection", out, "--model", model],
        "search": ["search", place, "red", "--model", model],
        "eval": ["eval", "retrieval", model, str(shards), "-o", out],
        "serve": ["serve", "--model", model, "--port", "0"],
    }
    assert run([*commands[command], "--by", "generator", "--device", "cpu"]) == 2
    error = one_error(capsys)
    assert "makes no vectors: leave out --by generator, or train one with model.match.width and mix.match" in error
    assert not Path(out).exists()


def test_the_towers_are_still_the_default(shards, matching_model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mmwudao.loading.towers.load_model_towers", lambda *_: ColourTowers())
    assert run(["embed", str(shards), "-o", str(tmp_path / "v"), "--model", str(matching_model_dir)]) == 0
    assert json.loads((tmp_path / "v" / "settings.json").read_text())["towers"] == content_hash(ColourTowers())
