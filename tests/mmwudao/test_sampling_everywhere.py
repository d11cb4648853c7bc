"""Each option of `SamplingOptions` is everywhere that a user may set it, with what its field says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image, PngImagePlugin

from generation.drawing.sampling import SamplingOptions
from mmwudao import load
from mmwudao.cli.app import run
from mmwudao.demo.actions import Actions
from mmwudao.demo.controls import chosen_sampling, sampling_controls, sampling_words
from mmwudao.demo.page import Page
from mmwudao.demo.words import EN, ZH, Words
from mmwudao.pictures import differing_pixels, encode_png, read_recipe
from mmwudao.pipeline import Pipeline
from mmwudao.service.schemas import GenerationRequest

FIELDS = dataclasses.fields(SamplingOptions)
each_field = pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)


@pytest.fixture(scope="module")
def pipe(tiny_model_dir: Path) -> Pipeline:
    return load(tiny_model_dir, device="cpu", dtype="float32")


def other_value(field: dataclasses.Field[Any], default: float) -> float:
    """An allowed value that is not the default."""
    least = field.metadata["least"]
    return next(value for value in (least, least + 1) if value != default)


@pytest.mark.parametrize("command", ["generate", "complete", "assemble"])
def test_the_command_line_has_every_option_with_its_help(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 300)
    assert run([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for field in FIELDS:
        (line,) = [line for line in lines if f"--{field.name.replace('_', '-')} " in line]
        assert field.metadata["help"] in line


@each_field
def test_http_has_every_option_with_its_limits_and_help(field: dataclasses.Field[Any]) -> None:
    described = GenerationRequest.model_json_schema()["properties"][field.name]
    number, nothing = described["anyOf"]
    assert nothing == {"type": "null"}
    assert number["type"] == {"int": "integer", "float": "number"}[str(field.type)]
    limits = {"minimum": "least", "maximum": "most", "exclusiveMinimum": "above"}
    assert {limits[name]: limit for name, limit in number.items() if name in limits} == {
        name: limit for name, limit in field.metadata.items() if name in limits.values() and limit is not None
    }
    assert described["description"] == field.metadata["help"]
    request = GenerationRequest(prompt="cat", **{field.name: field.default})
    assert request.sampling == {field.name: field.default}
    with pytest.raises(ValueError, match=field.name):
        GenerationRequest(prompt="cat", **{field.name: field.metadata["least"] - 1})


@each_field
def test_every_option_is_in_the_recipe_and_draws_the_picture_again(
    field: dataclasses.Field[Any], pipe: Pipeline, tmp_path: Path
) -> None:
    value = other_value(field, getattr(pipe.config.default_sampling, field.name))
    image = pipe.generate("cat", seed=5, sampling={field.name: value})[0]
    path = tmp_path / "picture.png"
    path.write_bytes(encode_png(image))
    recipe = read_recipe(path)
    assert recipe[field.name] == value
    assert differing_pixels(path, pipe.redraw(recipe)) == 0


def test_a_recipe_from_before_an_option_draws_the_same_picture(pipe: Pipeline, tmp_path: Path) -> None:
    """0.1.0 wrote neither `min_p` nor, at first, `window`."""
    path = tmp_path / "picture.png"
    path.write_bytes(encode_png(pipe.generate("cat", seed=5)[0]))
    _remove_text(path, ("min_p", "window"))
    recipe = read_recipe(path)
    assert not {"min_p", "window"} & set(recipe)
    assert differing_pixels(path, pipe.redraw(recipe)) == 0


def _remove_text(path: Path, names: tuple[str, ...]) -> None:
    with Image.open(path) as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        image.load()
        kept = PngImagePlugin.PngInfo()
        for name, value in image.text.items():
            if name not in names:
                kept.add_itxt(name, value)
        image.save(path, pnginfo=kept)


def test_all_options_at_once_replace_the_defaults(pipe: Pipeline) -> None:
    options = SamplingOptions(temperature=0.5, top_k=3)
    info = pipe.generate("cat", seed=5, sampling=options)[0].info
    assert {field.name: info[field.name] for field in FIELDS} == dataclasses.asdict(options)
    completed = pipe.complete(pipe.generate("cat", seed=5)[0], "cat", seed=5, sampling=options)[0].info
    assert {field.name: completed[field.name] for field in FIELDS} == dataclasses.asdict(options)


def controls(page: Page) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    with gr.Blocks(analytics_enabled=False):
        yield from zip(FIELDS, sampling_controls(page), strict=True)


@pytest.mark.parametrize("words", [EN, ZH], ids=lambda words: words.language)
def test_the_demo_has_a_control_for_every_option(words: Words, pipe: Pipeline, tmp_path: Path) -> None:
    page = Page(words, Actions(pipe, None, tmp_path), {})
    for field, control in controls(page):
        assert (control.label, control.info) == sampling_words(words, field)
        assert control.value == getattr(pipe.config.default_sampling, field.name)
        least, most = field.metadata["least"], field.metadata["most"]
        assert least <= control.minimum < control.maximum <= most
    values = [control.value for _, control in controls(page)]
    assert SamplingOptions(**chosen_sampling(values)) == pipe.config.default_sampling


def test_an_option_without_words_of_its_own_is_shown_with_its_help() -> None:
    silent = dataclasses.replace(ZH, sampling={})
    assert sampling_words(silent, FIELDS[1]) == ("Top k", FIELDS[1].metadata["help"])
    assert sampling_words(ZH, FIELDS[1]) == ZH.sampling["top_k"]
    assert set(EN.sampling) == set(ZH.sampling) <= {field.name for field in FIELDS}
