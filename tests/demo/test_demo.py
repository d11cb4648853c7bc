"""The demo without a browser and a server: what its buttons do, and its words."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import re
import time
import typing
import zipfile
from pathlib import Path

import gradio as gr
import numpy
import pytest
from PIL import Image

from data.shards import ShardWriter
from mmwudao.demo import actions as actions_module
from mmwudao.demo import library
from mmwudao.demo.actions import MAX_CANDIDATES, MAX_DRAWN, Actions, Preview, Refused, Result, Stopped, read_seed
from mmwudao.demo.page import errors_as_messages, picture_field, preview_html, show_drawing
from mmwudao.demo.words import EN, ZH, Reason, Words
from mmwudao.pictures import differing_pixels, read_recipe
from mmwudao.pipeline import MAX_PROMPT, Pipeline, load
from retrieval.collections.opening import Item
from retrieval.photos.indexing import PhotoRequest, index_photos
from retrieval.photos.places import read_place
from tests.helpers.photos import exif_bytes, save_colour
from tests.helpers.tiny_towers import COLOURS, ColourTowers, colour_sample


@pytest.fixture(scope="module")
def pipe(tiny_model_dir: Path) -> Pipeline:
    return load(tiny_model_dir, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "shards"
    with ShardWriter(folder, "train", len(COLOURS)) as writer:
        for k, family in enumerate(("noto", "l'atelier")):
            for name in COLOURS:
                writer.write(colour_sample(name, family, shade=k))
    return folder


@pytest.fixture
def actions(pipe, shards, tmp_path, monkeypatch):
    """The tiny model, and a collection of plain colours as the samples."""
    monkeypatch.setattr(library, "SAMPLES", shards)
    towers = ColourTowers().eval()
    collection = library.sample_collection(towers, tmp_path)
    with contextlib.closing(library.Library(collection, towers, tmp_path / "added")) as opened:
        yield Actions(pipe, opened, tmp_path / "results")


@pytest.fixture
def picture(tmp_path) -> str:
    Image.new("RGB", (50, 40), "yellow").save(tmp_path / "yellow.png")
    return str(tmp_path / "yellow.png")


def last(updates) -> Result:
    *previews, result = updates
    assert all(isinstance(one, Preview) for one in previews)
    assert isinstance(result, Result)
    return result


# drawing


def test_drawing_shows_previews_and_gives_pictures_that_can_be_drawn_again(actions, pipe):
    *previews, result = actions.draw("红心", n=2, seed=7, style="noto")
    shares = [preview.share for preview in previews]
    assert len(shares) >= 2
    assert shares == sorted(shares)
    assert all(len(preview.pictures) == 2 for preview in previews)
    assert [info["seed"] for info in result.infos] == [7, 8]
    for path in result.pictures:
        recipe = read_recipe(path)
        assert (recipe["prompt"], recipe["style"]) == ("红心", "noto")
        assert differing_pixels(path, pipe.redraw(recipe)) == 0
    with zipfile.ZipFile(result.download) as archive:
        assert [archive.read(path.name) for path in result.pictures] == [path.read_bytes() for path in result.pictures]


def test_one_picture_is_its_own_download(actions):
    result = last(actions.draw("cat", n=1, sampling={"guidance": 1.5, "temperature": 0.7}))
    assert result.pictures == [result.download]
    assert read_recipe(result.download)["guidance"] == 1.5
    assert read_recipe(result.download)["temperature"] == 0.7


def test_the_best_of_the_candidates(actions, pipe):
    result = last(actions.draw("a red apple", n=2, candidates=5, seed=3))
    scores = [info["score"] for info in result.infos]
    wanted = pipe.generate("a red apple", 2, 3, candidates=5)
    assert [info["seed"] for info in result.infos] == [image.info["seed"] for image in wanted]
    assert scores == sorted(scores, reverse=True)
    # nothing to choose from
    assert "score" not in last(actions.draw("a red apple", n=2, candidates=2, seed=3)).infos[0]


def test_stop_ends_the_drawing(actions):
    updates = actions.draw("cat", n=8, candidates=32, session="one")
    assert isinstance(next(updates), Preview)
    actions.stop("another session")
    assert isinstance(next(updates), Preview)
    actions.stop("one")
    with pytest.raises(Stopped):
        list(updates)
    assert len(last(actions.draw("cat", n=1, session="one")).pictures) == 1


def test_a_visitor_who_leaves_is_drawn_for_no_further(actions, monkeypatch):
    ended = []

    def generate(prompt, n, *rest, on_progress, **more):
        try:
            more |= {"on_progress": on_progress}
            return Pipeline.generate(actions.pipeline, prompt, n, *rest, **more)
        except Stopped:
            ended.append(prompt)
            raise

    monkeypatch.setattr(actions.pipeline, "generate", generate)
    updates = actions.draw("cat", n=8, candidates=32)
    next(updates)
    updates.close()
    assert ended == ["cat"]


def test_complete(actions, picture):
    result = last(actions.complete(picture, "moon", "left", 0.25, n=2, seed=1))
    for path in result.pictures:
        with Image.open(path) as image:
            image.load()
            assert (image.info["kept"], image.info["prompt"]) == ("left:0.25", "moon")


def test_caption_comes_language_by_language(actions, picture):
    told = list(actions.caption(picture, ["de", "zh"]))
    assert [list(one.told) for one in told] == [["de"], ["de", "zh"], ["de", "zh"]]
    assert [one.download is None for one in told] == [True, True, False]
    assert json.loads(told[-1].download.read_text(encoding="utf-8"))["captions"] == told[-1].told


def test_each_line_is_a_question(actions, picture):
    told = actions.ask(picture, "这是什么？\n\n  what colour is it? ")
    assert [one.language for one in told] == ["zh", "en"]
    assert told == actions.pipeline.ask(Image.open(picture), ["这是什么？", "what colour is it?"])


def test_a_model_without_an_upscaler_says_so(actions, picture):
    with pytest.raises(ValueError, match="has no upscaler"):
        actions.upscale(picture)


def test_upscale_by_the_shipped_model(picture, tmp_path):
    stretched, result = Actions(load("emoji", "cpu", "float32"), None, tmp_path / "results").upscale(picture)
    for path in (stretched, result.download):
        with Image.open(path) as image:
            assert image.size == (100, 80)
    assert (result.infos[0]["before"], result.infos[0]["after"]) == ("50×40", "100×80")


def test_results_are_removed_after_an_hour(actions):
    first = last(actions.draw("cat", n=1)).download
    second = last(actions.draw("cat", n=1)).download
    assert first.is_file()
    old = time.time() - actions_module.KEPT_FOR - 1
    os.utime(first.parent, (old, old))
    third = last(actions.draw("cat", n=1)).download
    assert not first.exists()
    assert second.is_file()
    assert third.is_file()


# searching


def test_search_by_text_picture_and_filter(actions, picture):
    result = actions.search("something red", k=2)
    assert {info["id"] for info in result.infos} == {"noto-red", "l'atelier-red"}
    with zipfile.ZipFile(result.download) as archive:
        records = json.loads(archive.read("results.json"))
        assert [record["file"] for record in records] == [path.name for path in result.pictures]
        assert records[0]["metadata"]["caption_de"] == "Quadrat, rot"
        shards = {record["metadata"]["shard"] for record in records}
        assert shards == {"train-00000.tar", "train-00001.tar"}, "the place on this machine is not told"
    assert [info["id"] for info in actions.search("", picture, "l'atelier", k=1).infos] == ["l'atelier-yellow"]
    only = actions.search("red", family="noto", where="concept = 'blue' OR concept = 'cyan'", k=5)
    assert {info["id"] for info in only.infos} == {"noto-blue", "noto-cyan"}
    assert actions.search("red", family="no such family").pictures == []
    assert actions.library.families == ["l'atelier", "noto"]


def test_an_added_picture_is_found(actions, picture):
    assert actions.add(picture, "ein Quadrat in gelb") == 17
    assert actions.add(picture, "ein Quadrat in gelb") == 17, "the same picture again replaces it"
    result = actions.search("yellow", family=library.OWN)
    assert len(result.pictures) == 1
    assert result.infos[0]["metadata"] == {"kind": "image", "family": "own", "caption_de": "ein Quadrat in gelb"}
    with Image.open(result.pictures[0]) as image:
        assert image.convert("RGB").getpixel((5, 5)) == (255, 255, 0)


def test_items_of_other_programs_open_no_file(actions, tmp_path):
    """Whoever may write into the collection does not choose what the demo reads."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    collection, vector = actions.library._collection, numpy.eye(8)[0]
    names = ("../secret", "../secret.png", "own-0123456789abcde/")
    collection.upsert([Item(name, vector, {"family": "x", "shard": str(tmp_path / "secret.png")}) for name in names])
    result = actions.search("red", family="x")
    assert (result.pictures, result.hidden) == ([], 3)


def test_a_folder_of_pictures(pipe, tmp_path):
    """Copies of its pictures are shown, without what a camera wrote into them, and nothing outside of it."""
    folder, towers = tmp_path / "pics", ColourTowers().eval()
    for name in ("red", "green", "blue"):
        save_colour(folder / f"{name}.jpg", name, (1500, 10), exif=exif_bytes(1, "2019:07:04 12:30:00"))
    save_colour(tmp_path / "secret.png", "yellow")
    place = index_photos(lambda: towers, PhotoRequest(folder, tmp_path / "own", workers=1)).collection
    collection = library.given_collection(towers, place)
    collection.upsert([Item("x", towers.encode_text(["cyan"])[0].numpy(), {"path": "../secret.png"})])
    (folder / "green.jpg").unlink()
    with contextlib.closing(library.Library(collection, towers, tmp_path / "added", place=read_place(place))) as opened:
        assert not opened.can_add
        actions = Actions(pipe, opened, tmp_path / "results")
        result = actions.search("white - 2*red - 0.5*green", k=4)
        assert [info["id"] for info in result.infos][0] == "blue.jpg"
        assert (len(result.pictures), result.hidden) == (2, 2)
        with Image.open(result.pictures[0]) as image:
            assert image.size[0] == 1280
            assert not image.getexif()
        with pytest.raises(ValueError, match="missing after"):
            actions.search("red +")


def test_a_collection_of_other_towers(actions, tmp_path):
    other = ColourTowers()
    other.project.weight.data.zero_()
    with pytest.raises(ValueError, match="other towers"):
        library.given_collection(other, str(tmp_path / "collection"))
    with contextlib.closing(library.given_collection(actions.library._towers, str(tmp_path / "collection"))) as again:
        assert again.count() == 16


# bad input


def test_bad_pictures(actions, tmp_path):
    files = {"text.png": b"no picture", "empty.jpg": b"", "vector.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    Image.new("1", (5000, 5000)).save(tmp_path / "huge.png")
    cases: list[tuple[str | None, Reason]] = [(None, "no_picture"), ("", "no_picture")]
    cases += [(str(tmp_path / name), "not_a_picture") for name in files]
    cases += [(str(tmp_path / "huge.png"), "too_large"), (str(tmp_path / "none.png"), "not_a_picture")]
    for path, reason in cases:
        for call in (
            lambda: list(actions.caption(path, ["zh"])),  # noqa: B023
            lambda: list(actions.complete(path, "moon")),  # noqa: B023
            lambda: actions.upscale(path),  # noqa: B023
            lambda: actions.add(path),  # noqa: B023
        ):
            with pytest.raises(Refused) as caught:
                call()
            assert caught.value.reason == reason, path
        if path:
            with pytest.raises(Refused):
                actions.search("", path)
    Image.new("L", (3000, 10)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match="at most 2048 a side"):
        actions.upscale(str(tmp_path / "wide.png"))


def test_bad_words_and_numbers(actions, picture):
    cases = [
        (lambda: list(actions.draw(" \n")), EN.refusals["no_prompt"]),
        (lambda: list(actions.draw("x" * (MAX_PROMPT + 1))), "at most 1000"),
        (lambda: list(actions.draw("cat", n=0)), f"from 1 to {MAX_DRAWN}"),
        (lambda: list(actions.draw("cat", n=MAX_DRAWN + 1)), f"from 1 to {MAX_DRAWN}"),
        (lambda: list(actions.draw("cat", candidates=MAX_CANDIDATES + 1)), f"from 1 to {MAX_CANDIDATES}"),
        (lambda: list(actions.draw("cat", style="cubism")), "unknown style"),
        (lambda: list(actions.draw("cat", seed=-1)), "the seed must lie in"),
        (lambda: list(actions.draw("cat", sampling={"temperature": -1})), "temperature"),
        (lambda: list(actions.complete(picture, "")), EN.refusals["no_prompt"]),
        (lambda: list(actions.complete(picture, "cat", "/etc", 0.5)), "say top:0.5"),
        (lambda: list(actions.complete(picture, "cat", "top", 0.01)), "the share must leave"),
        (lambda: list(actions.caption(picture, [])), EN.refusals["no_language"]),
        (lambda: actions.ask(picture, " \n"), EN.refusals["no_question"]),
        (lambda: actions.ask(picture, "a?\n" * 17), "17 questions: at most 16"),
        (lambda: list(actions.caption(picture, ["tlh"])), "unknown language"),
        (lambda: actions.search(), EN.refusals["one_query"]),
        (lambda: actions.search("red", picture), EN.refusals["one_query"]),
        (lambda: actions.search("red", where="colour = 1"), "no column 'colour'"),
        (lambda: actions.search("red", where="family ="), "where"),
        (lambda: actions.search("red", k=0), "from 1 to"),
        (lambda: actions.search("x" * 9000), "at most 8192"),
        (lambda: actions.add(picture, "x" * 2000), EN.refusals["no_description"]),
        (lambda: read_seed("seven"), "a whole number"),
    ]
    for call, problem in cases:
        with pytest.raises(ValueError, match=re.escape(problem)) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert (read_seed(" "), read_seed(" 7 ")) == (None, 7)


def test_errors_become_messages(caplog):
    def shown(words: Words, error: Exception) -> str:
        with pytest.raises(gr.Error) as caught, errors_as_messages(words):
            raise error
        return str(caught.value.message)

    assert shown(ZH, Refused("no_prompt")) == ZH.refusals["no_prompt"]
    assert shown(EN, ValueError("two\nlines of <script>")) == "two lines of &lt;script&gt;"
    assert caplog.text == ""
    with caplog.at_level(logging.ERROR):
        assert shown(ZH, RuntimeError("/secret/place")) == ZH.refusals["failed"]
    assert "/secret/place" in caplog.text


# the page


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Words)])
def test_every_word_is_there_in_both_languages(field):
    english, chinese = getattr(EN, field), getattr(ZH, field)
    if isinstance(english, str):
        assert english.strip()
        assert chinese.strip()
        assert set(re.findall(r"\{\w*\}", english)) == set(re.findall(r"\{\w*\}", chinese))
    elif field == "refusals":
        assert set(english) == set(chinese) == set(typing.get_args(Reason))
    elif field == "sampling":
        assert set(english) == set(chinese)
        assert all(label and info for words in (english, chinese) for label, info in words.values())
    else:
        assert len(english) == len(chinese) > 2


def test_what_a_drawing_shows(actions):
    steps = list(show_drawing(ZH, actions.draw("cat", n=2, seed=1), ZH.drawn))
    live, *_, start, stop = steps[0]
    assert live["value"].count("data:image/webp;base64,") == 2
    assert (start["visible"], stop["visible"]) == (False, True)
    live, gallery, note, download, start, stop = steps[-1]
    assert (live["visible"], start["visible"], stop["visible"]) == (False, True, False)
    assert [label for _, label in gallery["value"]] == ["随机种子 1", "随机种子 2"]
    assert "画好了 2 张" in note
    assert download["value"].endswith("pictures.zip")
    assert "&lt;" in preview_html([], 0.5, "<")


def test_an_upload_is_neither_opened_nor_fetched():
    with gr.Blocks(analytics_enabled=False):
        field = picture_field(EN)
    assert field.preprocess(None) is None
    upload = gr.data_classes.ImageData(path="/no/such/file.png", orig_name="file.png")
    assert field.preprocess(upload) == "/no/such/file.png"
    with pytest.raises(gr.Error, match="not fetched"):
        asyncio.run(field.async_move_resource_to_block_cache("http://127.0.0.1:9/picture.png"))
