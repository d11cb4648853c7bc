"""Figures of towers and of a generator: checked against features whose answers are known, and against counting."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.reading import Example, open_shards
from data.sample import Caption, DataError
from data.shards import ShardWriter
from generation.drawing.sampling import SamplingOptions
from mmwudao.cli.app import run
from mmwudao.evaluation import (
    GeneratorEvalConfig,
    candidate_texts,
    evaluate_generator,
    format_generator_table,
    nearest_pictures,
    neighbour_sheet,
    r_precision,
)
from mmwudao.loading.model_dir import ModelConfig
from retrieval.evaluation.evaluate import (
    RetrievalEvalConfig,
    classify,
    evaluate,
    evaluate_split,
    format_retrieval_table,
    held_out_splits,
)
from tests.helpers.tiny_towers import COLOURS, GERMAN, ColourTowers, colour_sample

FAMILIES = ("noto", "twemoji", "other")


def write_splits(folder, splits=("train", "test-family", "test-concept")):
    for split in splits:
        with ShardWriter(folder, split) as writer:
            for shade, family in enumerate(FAMILIES):
                for name in COLOURS:
                    writer.write(colour_sample(name, family, shade))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def examples(shards):
    return list(open_shards(shards, "test-family"))


def test_perfect_towers_find_everything(shards):
    record = evaluate(ColourTowers(), shards, RetrievalEvalConfig(("test-family", "test-concept")))
    measured = record["splits"]["test-family"]
    assert measured["pictures"] == 24
    assert measured["concepts"] == 8
    assert list(measured["languages"]) == ["en", "de"], "in the order of the seven"
    for figures in (*measured["languages"].values(), measured["mean"]):
        for way in ("text_to_image", "image_to_text"):
            assert figures[way] == {
                "recall@1": 1, "recall@5": 1, "recall@10": 1, "median_rank": 1, "queries": 24
            }  # fmt: skip
        assert figures["zero_shot"]["concept"] == {"top@1": 1, "top@5": 1, "classes": 8}
        assert figures["zero_shot"]["family"]["classes"] == 3
        assert figures["shuffled"]["text_to_image"]["recall@1"] < 0.6
    json.dumps(record)


def test_figures_agree_with_counting(examples):
    """Another way to the same figures: sort all candidates of each query, look for the first right one."""
    towers = ColourTowers(noise=0.6)
    samples = [sample for sample, _ in examples]
    features = towers.encode_image([image for _, image in examples])
    measured = evaluate_split(towers, samples, features)["languages"]["de"]
    names = list(dict.fromkeys(sample.captions["de"].name for sample in samples))
    text = dict(zip(names, towers.encode_text(names), strict=True))

    def first_right(scores, concepts, concept):
        order = scores.argsort(descending=True).tolist()
        return 1 + next(place for place, k in enumerate(order) if concepts[k] == concept)

    concepts = [sample.concept for sample in samples]
    places = [first_right(features @ text[s.captions["de"].name], concepts, s.concept) for s in samples]
    for k in (1, 5, 10):
        assert measured["text_to_image"][f"recall@{k}"] == sum(place <= k for place in places) / 24
    assert measured["text_to_image"]["median_rank"] == torch.tensor(places).double().quantile(0.5)
    assert max(places) > 1, "the noise leaves something to count"
    of_text = {name: next(s.concept for s in samples if s.captions["de"].name == name) for name in names}
    table = torch.stack(list(text.values()))
    places = [
        first_right(table @ feature, list(of_text.values()), s.concept)
        for feature, s in zip(features, samples, strict=True)
    ]
    for k in (1, 5):
        assert measured["image_to_text"][f"recall@{k}"] == sum(place <= k for place in places) / 24


def test_languages_may_be_missing_and_concepts_too(examples):
    samples = [colour_sample(name, "noto") for name in COLOURS]
    samples[0].captions["ko"] = Caption("red, 빨강")
    samples[1].captions = {"und": Caption("green")}
    for sample in samples:
        sample.concept = None
    features = ColourTowers().encode_image([image for _, image in examples[:8]])
    measured = evaluate_split(ColourTowers(), samples, features)
    assert list(measured["languages"]) == ["en", "de", "ko", "und"]
    assert measured["concepts"] == 8
    assert "family" not in measured["mean"]["zero_shot"], "one family is nothing to choose from"
    format_retrieval_table({"splits": {"test": measured}})
    assert {name: figures["text_to_image"]["queries"] for name, figures in measured["languages"].items()} == {
        "en": 7, "de": 7, "ko": 1, "und": 1
    }  # fmt: skip


def test_constant_towers_classify_nothing():
    features = torch.nn.functional.normalize(torch.ones(4, 8), dim=1)
    classes = [(name, name) for name in ("red", "green", "blue", "white")]

    class Constant(ColourTowers):
        def encode_tokens(self, tokens):
            return features[:1].expand(len(tokens), -1)

    assert classify(Constant(), features, classes, ("{}",))["top@1"] == 0


def test_templates_are_averaged():
    towers = ColourTowers()
    pixels = towers.encode_image([Image.new("RGB", (8, 8), COLOURS[name]) for name in ("red", "blue")])
    figures = classify(towers, pixels, [("1", "red"), ("2", "blue")], ("{}", "a picture of {}"))
    assert figures == {"top@1": 1, "top@5": 1, "classes": 2}
    # a template that names another colour first pulls every class to it
    assert classify(towers, pixels, [("1", "red"), ("2", "blue")], ("red {}",))["top@1"] == 0


def test_splits(shards, tmp_path):
    assert held_out_splits(shards) == ["test-concept", "test-family"]
    assert held_out_splits(write_splits(tmp_path, ["train"])) == ["train"]
    with pytest.raises(DataError, match="no val shard"):
        evaluate(ColourTowers(), shards, RetrievalEvalConfig(("val",)))
    with pytest.raises(ValueError, match="limit must be"):
        RetrievalEvalConfig(("test-family",), limit=0)


def test_retrieval_command(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mmwudao.loading.towers.load_model_towers", lambda *_: ColourTowers())
    out = tmp_path / "out"
    assert run(["eval", "retrieval", "any", str(shards), "-o", str(out), "--limit", "10"]) == 0
    printed = capsys.readouterr().out
    assert "test-concept" in printed
    assert str(out / "retrieval.json") in printed.replace("\n", "")
    record = json.loads((out / "retrieval.json").read_text())
    assert record["splits"]["test-family"]["pictures"] == 10
    with Image.open(out / "retrieval.png") as picture:
        assert picture.width > picture.height
    assert run(["eval", "retrieval", "any", str(shards), "-o", str(out), "--split", "val"]) == 2
    assert "error: " in capsys.readouterr().err


def test_models_without_towers_are_named(tiny_model_dir, shards, tmp_path, capsys):
    assert run(["eval", "retrieval", str(tiny_model_dir), str(shards), "-o", str(tmp_path)]) == 2
    assert "has no towers" in capsys.readouterr().err
    assert run(["eval", "retrieval", "nothing", str(shards), "-o", str(tmp_path)]) == 2
    assert "no model 'nothing'" in capsys.readouterr().err


def test_towers_of_a_model_directory(tiny_model_dir, tmp_path):
    from mmwudao.loading.towers import load_model_towers
    from retrieval.towers.base import save_towers
    from tests.helpers.tiny_towers import tiny_towers
    from vqvae.storage.parts import ModelError, stored_hash

    towers = tiny_towers()
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    save_towers(towers, model / "towers", torch.float32)
    config = json.loads((model / "config.json").read_text())
    config["parts"]["towers"] = {"path": "towers", "hash": stored_hash(model / "towers")}
    (model / "config.json").write_text(json.dumps(config))
    for source in (model, model / "towers"):
        loaded = load_model_towers(source, "cpu")
        assert torch.equal(loaded.encode_text(["ein Apfel"]), towers.encode_text(["ein Apfel"]))
    config["parts"]["towers"]["hash"] = "0" * 64
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="towers is not the one"):
        load_model_towers(model, "cpu")


# the generator


class Painter:
    """A pipeline without models: paints the colour that the prompt names, or always the same one."""

    def __init__(self, always=None):
        self.config = ModelConfig(
            name="painter",
            image_size=32,
            styles=("noto", "twemoji"),
            languages=("en", "de"),
            default_sampling=SamplingOptions(),
            parts={},
        )
        self.always, self.prompts = always, []

    def generate(self, prompt, *arguments, **options):
        self.prompts = list(prompt)
        pictures = []
        for one in self.prompts:
            named = next(name for name in COLOURS if name in one or GERMAN[name] in one)
            pictures.append(Image.new("RGB", (32, 32), COLOURS[self.always or named]))
        return pictures


def test_r_precision_tells_a_painter_from_a_blind_one(shards):
    config = GeneratorEvalConfig(prompts=8, candidates=8, neighbours=2)
    painter: Any = Painter()
    record, sheet = evaluate_generator(painter, ColourTowers(), shards, config)
    assert record["r_precision"] == dict.fromkeys(("en", "de"), {"drawn": 1, "real": 1, "random": 0})
    assert painter.prompts[0].endswith("noto style"), "the family of the held-out picture, in the prompt's language"
    assert painter.prompts[8].endswith("noto Stil")
    assert record["nearest"]["drawn"]["median"] == pytest.approx(1, abs=1e-4), "plain colours are in the train split"
    assert record["pictures"][0]["nearest"].endswith(record["pictures"][0]["sample"].split("-")[1])
    assert sheet.height == 8 * 64
    json.dumps(record)
    format_generator_table(record)
    blind_painter: Any = Painter(always="red")
    blind, _ = evaluate_generator(blind_painter, ColourTowers(), shards, config)
    assert blind["mean"] == {"drawn": 1 / 8, "real": 1, "random": 1 / 8}


def test_a_tie_is_a_miss():
    towers = ColourTowers()
    red = towers.encode_text(["red"])
    assert r_precision(towers, red, [["red", "blue"]]) == 1
    assert r_precision(towers, red, [["red square", "red"]]) == 0


def test_wrong_candidates_are_of_other_concepts(examples):
    samples = [sample for sample, _ in examples]
    config = GeneratorEvalConfig(candidates=8)
    rows = candidate_texts(samples, samples, "en", config)
    for sample, row in zip(samples, rows, strict=True):
        assert row[0] == sample.captions["en"].name
        assert len(set(row)) == 8
    assert rows == candidate_texts(samples, samples, "en", config)
    assert rows != candidate_texts(samples, samples, "en", GeneratorEvalConfig(candidates=8, seed=1))
    with pytest.raises(DataError, match="ask for 8 candidates or fewer"):
        candidate_texts(samples, samples, "en", GeneratorEvalConfig(candidates=9))


def test_nearest_pictures_agree_with_sorting_all(monkeypatch):
    monkeypatch.setattr("mmwudao.evaluation.BATCH", 7)  # several batches, the last not full
    torch.manual_seed(0)
    colours = torch.randint(0, 256, (40, 3)).tolist()
    pictures = [Image.new("RGB", (8, 8), tuple(colour)) for colour in colours]
    examples = [Example(colour_sample("red", f"p{k}"), picture) for k, picture in enumerate(pictures)]
    towers = ColourTowers()
    features = towers.encode_image(pictures)
    queries = features[[3, 17]] + 0.1
    found = nearest_pictures(towers, queries, iter(examples), 5)
    for query, near in zip(queries, found, strict=True):
        values, places = (features @ query).sort(descending=True)
        assert [entry.id for entry in near] == [f"p{k}-red" for k in places[:5].tolist()]
        assert [entry.similarity for entry in near] == pytest.approx(values[:5].tolist(), abs=1e-5)
    with pytest.raises(DataError, match="no training picture"):
        nearest_pictures(towers, queries, [], 5)


def test_sheet_shows_each_picture_beside_its_neighbours(examples):
    towers = ColourTowers()
    drawn = [Image.new("RGB", (32, 32), COLOURS[name]) for name in ("red", "green", "blue", "white")]
    nearest = nearest_pictures(towers, towers.encode_image(drawn), examples, 2)
    sheet = neighbour_sheet(drawn, nearest, columns=2)  # two languages of two prompts each
    left, right = 10, 64 + 8 + 10
    block = 3 * 64 + 2 * 8
    for k, name in enumerate(("red", "green", "blue", "white")):
        x, y = k // 2 * block, k % 2 * 64 + 10
        assert sheet.getpixel((x + left, y)) == COLOURS[name]
        near = np.asarray(sheet)[y, x + right].astype(int)
        assert np.abs(near - COLOURS[name]).max() <= 3


def test_bad_options_are_one_line(shards, tiny_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mmwudao.loading.towers.load_model_towers", lambda *_: ColourTowers())
    command = ["eval", "generator", str(tiny_model_dir), str(shards), "-o", str(tmp_path), "--device", "cpu"]
    for options, problem in (
        (["--prompts", "1"], "prompts must be"), (["--candidates", "50"], "8 candidates or fewer")
    ):  # fmt: skip
        assert run([*command, *options]) == 2
        assert problem in capsys.readouterr().err
    with pytest.raises(ValueError, match="neighbours must be a whole number of at least 1"):
        GeneratorEvalConfig(neighbours=0)


def test_generator_command_with_a_real_pipeline(shards, tiny_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mmwudao.loading.towers.load_model_towers", lambda *_: ColourTowers())
    command = ["eval", "generator", str(tiny_model_dir), str(shards), "-o", str(tmp_path), "--device", "cpu"]
    assert run([*command, "--prompts", "2", "--candidates", "4", "--train-limit", "6", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "generator.json").read_text())
    assert len(record["pictures"]) == 4
    assert all(0 <= figure <= 1 for figures in record["r_precision"].values() for figure in figures.values())
    with Image.open(tmp_path / "nearest.png") as sheet:
        assert sheet.height == 2 * 64
