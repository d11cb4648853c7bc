"""A generator that reads vectors of its towers: model directories, drawing, replay, captions, styles, the service."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data.text import TextTokenizer
from generation.rows.texts import CaptionMix
from generation.training.train_style import StyleBase, StyleTrainConfig, train
from generation.transformer.adapters import AdapterOptions
from generation.transformer.model import Transformer
from generation.transformer.prompt_features import PromptFeatures
from mmwudao import load, planning
from mmwudao.cli.app import run
from mmwudao.loading.model_dir import assemble_model, read_model_config
from mmwudao.loading.options import Selection
from mmwudao.pictures import differing_pixels, encode_png, read_recipe
from mmwudao.pipeline import Pipeline
from mmwudao.service.draw_requests import DrawRequest, draw_block
from retrieval.towers.base import save_towers
from retrieval.towers.multiscale import MultiScaleTowers
from tests.helpers.tiny_codes import coded, write_codes
from tests.helpers.tiny_towers import tiny_towers
from vqvae.storage.parts import ModelError, load_part, save_part, stored_hash
from vqvae.training.config import LoopConfig

Assemble = Callable[..., Path]


@pytest.fixture(scope="module")
def assemble(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Assemble:
    """Makes a model directory whose generator reads vectors of tiny towers."""
    parts = tmp_path_factory.mktemp("parts")
    towers = save_towers(tiny_towers(), parts / "towers")
    generator = load_part(Transformer, tiny_model_dir / "generator")

    def make(
        out: Path, towers: Path | None = towers, width: int = 32, selection: Selection | None = None, kind: Any = "text"
    ) -> Path:
        features = PromptFeatures(kind, width, stored_hash(parts / "towers"))
        torch.manual_seed(1)
        model = Transformer(replace(generator.config, prompt_features=features))
        folder = parts / f"generator-{out.name}"
        save_part(model, folder)
        config = read_model_config(tiny_model_dir)
        return assemble_model(
            tiny_model_dir / "tokenizer",
            folder,
            tiny_model_dir / "text.model",
            out,
            name="featured",
            image_size=32,
            styles=config.styles,
            languages=config.languages,
            default_sampling=config.default_sampling,
            optional={"towers": towers} if towers else None,
            describes="tagged",
            selection=selection,
        )

    return make


@pytest.fixture(scope="module")
def folder(assemble: Assemble, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble(tmp_path_factory.mktemp("featured") / "model")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return load(folder, device="cpu", dtype="float32")


def test_the_vector_is_of_the_prompt_without_its_style(pipe: Pipeline) -> None:
    expected = pipe.towers.encode_text(["red heart"])
    for text in ("red heart", "red heart, noto style"):
        prompt = pipe.encode_prompt(text)
        assert prompt.features is not None
        torch.testing.assert_close(prompt.features, expected)
    assert list(pipe.encode_prompt("red heart, noto style")) == pipe.encode_text("red heart, noto style")


def test_a_picture_is_the_same_in_any_company_and_again(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    among = pipe.generate(["a much longer prompt than that", "red heart"], n=2, seed=3, style="noto")[2]
    alone = pipe.generate("red heart", seed=5, style="noto")[0]
    assert alone.tobytes() == among.tobytes()
    drawings = [*pipe.plan("moon", seed=1), *pipe.plan("red heart", seed=5, style="noto")]
    served = draw_block(pipe, [DrawRequest(one) for one in drawings])
    assert served[1].tobytes() == alone.tobytes()
    path = tmp_path / "picture.png"
    path.write_bytes(encode_png(alone))
    recipe = read_recipe(path)
    assert recipe["towers_hash"] == read_model_config(folder).parts["towers"].hash
    assert differing_pixels(path, load(folder, device="cpu", dtype="float32").redraw(recipe)) == 0
    with pytest.raises(ModelError, match="was drawn with the towers 0000, and"):
        pipe.redraw(recipe | {"towers_hash": "0000"})


def test_completing_describing_and_ranking(pipe: Pipeline) -> None:
    image = pipe.generate("red heart", seed=1)[0]
    completed = pipe.complete(image, "blue fish", n=2, seed=4)
    assert [one.size for one in completed] == [(32, 32)] * 2
    assert len(pipe.caption([image], "en")) == 1
    assert len(pipe.rerank("blue fish", completed, by="both")) == 2


def test_a_style_is_learned_on_it(folder: Path, tmp_path: Path) -> None:
    pipe = load(folder, device="cpu", dtype="float32")
    tokenizer = read_model_config(folder).parts["tokenizer"].hash
    splits = {"train": range(12), "test-family": range(12, 16), "test-concept": range(16, 20)}
    write_codes(tmp_path / "codes", {name: [coded(n) for n in numbers] for name, numbers in splits.items()}, tokenizer)
    loop = LoopConfig(out=str(tmp_path / "run"), steps=2, batch_size=4, precision="float32", device="cpu")
    config = StyleTrainConfig(
        codes=str(tmp_path / "codes"),
        family="noto",
        captions=CaptionMix(style=0.0),
        adapter=AdapterOptions(method="ptuning", prompt_vectors=2, encoder_width=2),
        loop=loop,
    )
    base = StyleBase(pipe.generator, pipe.text, pipe.config.parts["generator"].hash, pipe.features)
    adapter = train(config, base)
    styled = load(folder, device="cpu", dtype="float32", adapter=adapter)
    assert styled.encode_prompt("moon").features is not None
    assert styled.generate("moon", seed=1)[0].size == (32, 32)
    with pytest.raises(ValueError, match="reads vectors of its towers in the prompt"):
        train(config, replace(base, features=None))


def test_without_its_towers_or_with_others_it_is_not_loaded(assemble: Assemble, folder: Path, tmp_path: Path) -> None:
    own = read_model_config(folder).parts["towers"].hash
    with pytest.raises(ModelError, match=rf"of the towers {own[:12]}, and there are none: .*assemble --towers") as none:
        assemble(tmp_path / "none", towers=None)
    torch.manual_seed(9)
    towers = tiny_towers()
    others = MultiScaleTowers(towers.config, TextTokenizer(_text_model(folder, tmp_path)))
    other = save_towers(others, tmp_path / "other-towers")
    found = stored_hash(other)
    with pytest.raises(ModelError, match=rf"{own[:12]}, not of these \({found[:12]}\): put the towers") as wrong:
        assemble(tmp_path / "others", towers=other)
    for caught in (none, wrong):
        assert "\n" not in str(caught.value)
    # in a directory that was whole once
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    del config["parts"]["towers"]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"the towers {own[:12]}, and there are none"):
        load(broken, device="cpu")
    replaced = shutil.copytree(folder, tmp_path / "replaced")
    shutil.copyfile(other / "model.safetensors", replaced / "towers" / "model.safetensors")
    with pytest.raises(
        ModelError, match=rf"towers is not the one config.json names \(hash {found[:12]}, not {own[:12]}"
    ):
        load(replaced, device="cpu")


def test_towers_of_another_width(assemble: Assemble, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="reads vectors of 16 numbers, and the towers make 32: put the towers"):
        load(assemble(tmp_path / "narrow", width=16), device="cpu")


def test_the_towers_are_checked_before_anything_is_drawn(pipe: Pipeline) -> None:
    assert "towers" in vars(pipe)
    assert pipe.features is not None


def _text_model(folder: Path, out: Path) -> Path:
    path = out / "text.model"
    path.write_bytes((folder / "towers" / "text.model").read_bytes())
    return path


def test_the_models_own_number_of_candidates(assemble: Assemble, pipe: Pipeline, tmp_path: Path) -> None:
    choosy = load(assemble(tmp_path / "choosy", selection=Selection(candidates=3, judge="towers")), "cpu", "float32")
    expected = pipe.generate("red heart", n=2, seed=4, candidates=6, rerank="towers")
    assert "score" not in pipe.generate("red heart", n=2, seed=4)[0].info
    found = choosy.generate("red heart", n=2, seed=4)
    assert [one.tobytes() for one in found] == [one.tobytes() for one in expected]
    assert [one.info["seed"] for one in found] == [one.info["seed"] for one in expected]
    assert found[0].info["score"] >= found[1].info["score"]
    plain = choosy.generate("red heart", n=2, seed=4, candidates=0)
    assert [one.info["seed"] for one in plain] == [4, 5]
    assert len(choosy.generate(["moon", "fish"], seed=0)) == 2
    with pytest.raises(ValueError, match="candidates must be a whole number from 1 to 60, not 0"):
        Selection(candidates=0)
    record = json.loads((pipe.folder / "config.json").read_text())
    for changes, problem in (
        (
            {"selection": {"candidates": 2, "judge": "both"}, "describes": "no"},
            "judge is both, and the model only draws",
        ),
        (
            {"selection": {"candidates": 2, "judge": "towers"}, "parts": {}},
            "judge is towers, and the model has no towers",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(record | changes))
        with pytest.raises(ModelError, match=problem):
            read_model_config(tmp_path)


def test_drawing_what_a_picture_shows(
    assemble: Assemble,
    pipe: Pipeline,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = assemble(tmp_path / "both", kind="both")
    both = load(folder, device="cpu", dtype="float32")
    red = Image.new("RGB", (50, 40), "red")
    (first,) = both.generate("", seed=3, like=red)
    vector = both.encode_like(red)
    torch.testing.assert_close(vector, both.towers.encode_image([red]))
    # random towers give all pictures much the same vector; the opposite one shows that it counts
    opposite = planning.plan(both.config, "", seed=3, like=planning.like_text(-vector))
    assert both.draw(opposite)[0].tobytes() != first.tobytes()
    assert both.generate("moon", seed=3, like=red)[0].info["like"] == first.info["like"] == planning.like_text(vector)
    # it describes what it sees by that vector, too
    told, features = both.rerank("moon", [red, Image.new("RGB", (50, 40), "blue")]), both.features
    assert len(both.caption([red], "en", by="generator")) == 1
    monkeypatch.setattr(features, "of_picture", lambda image: -vector)
    assert both.rerank("moon", [red, Image.new("RGB", (50, 40), "blue")]) != told
    monkeypatch.undo()
    best = both.generate("", n=2, seed=3, like=red, candidates=4)
    assert best[0].info["score"] >= best[1].info["score"]
    path = tmp_path / "first.png"
    path.write_bytes(encode_png(first))
    assert differing_pixels(path, both.redraw(read_recipe(path))) == 0
    with pytest.raises(ModelError, match="was not trained to draw from a picture"):
        pipe.generate("", like=red)
    with pytest.raises(ValueError, match="an empty prompt"):
        both.generate("", like=red, style="noto")
    red.save(tmp_path / "red.png")
    options = ["--model", str(folder), "--device", "cpu", "--dtype", "float32", "-o", str(tmp_path / "out")]
    assert run(["generate", "--like", str(tmp_path / "red.png"), "--seed", "3", *options]) == 0
    capsys.readouterr()
    assert differing_pixels(tmp_path / "out" / "picture-3.png", first) == 0
    (tmp_path / "bad.png").write_bytes(b"text")
    for name, problem in (("bad.png", "not a picture"), ("none.png", "no picture at")):
        assert run(["generate", "--like", str(tmp_path / name), *options]) == 2
        error = capsys.readouterr().err
        assert problem in error
        assert len(error.strip().splitlines()) == 1
