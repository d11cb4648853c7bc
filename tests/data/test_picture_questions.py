"""`data build questions`: facts of pictures and scenes, and what is held out."""

from __future__ import annotations

import io
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.images import open_image
from data.reading import open_shards
from data.recipes.picture_facts import ASKED, COLOUR_WORDS, COLOURS, base_name, main_colour, skin_tone
from data.recipes.questions import build_questions, is_held_out_pair, picture_questions, scene_of
from data.recipes.settings import QuestionSettings
from data.sample import Caption, DataError, Question, Sample
from data.shards import Manifest, ShardWriter, write_manifest
from data.styles import LANGUAGES
from mmwudao.cli.app import run


def disc(colour: str, size: int = 32) -> bytes:
    """A square of a colour with a white margin."""
    image = Image.new("RGB", (size, size), "white")
    image.paste(Image.new("RGB", (size // 2, size // 2), colour), (size // 4, size // 4))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def sample(name: str, colour: str = "red", **changes) -> Sample:
    captions = {"en": Caption(name), "zh": Caption(f"中{name}")}
    return Sample(name, disc(colour), "png", captions, base_concept=name, licence="MIT", family="noto", **changes)


@pytest.mark.parametrize(
    ("shown", "colour"),
    [
        ("red", "red"), ("#ff8c00", "orange"), ("#ffdd00", "yellow"), ("green", "green"), ("#1e90ff", "blue"),
        ("purple", "purple"), ("#ffc0cb", "pink"), ("#8b4513", "brown"), ("black", "black"), ("gray", "gray"),
        ("white", None), ("#7b5dc9", "purple"), ("#ffb02e", "yellow"), ("#444444", "black"),
    ],
)  # fmt: skip
def test_the_main_colour_is_measured(shown, colour):
    assert main_colour(open_image(disc(shown))) == colour


def test_no_colour_where_none_has_half_of_it():
    image = Image.new("RGB", (30, 10), "red")
    image.paste(Image.new("RGB", (10, 10), "blue"), (10, 0))
    image.paste(Image.new("RGB", (10, 10), "green"), (20, 0))
    assert main_colour(image) is None


def test_a_skin_tone_is_what_the_name_says():
    assert skin_tone("1f44b-1f3ff", Caption("waving hand: dark skin tone")) == "dark skin tone"
    assert skin_tone("1f44b-1f3ff", Caption("挥手：较深肤色")) == "较深肤色"
    assert base_name("1f44b-1f3ff", Caption("挥手：较深肤色")) == "挥手"
    flag = Caption("flag: France")
    assert (base_name("1f1eb-1f1f7", flag), skin_tone("1f1eb-1f1f7", flag)) == ("flag: France", None)
    assert skin_tone("1f468-1f3ff-200d-1f9b2", Caption("man: dark skin tone, bald")) is None


def test_every_language_has_every_question_and_colour():
    texts: list[Mapping[str, Any]] = [*ASKED.values(), COLOUR_WORDS]
    assert all(set(asked) == set(LANGUAGES) for asked in texts)
    assert all(len(set(words)) == len(COLOURS) for words in COLOUR_WORDS.values())
    assert all("{name}" in text for kind in ("left", "above") for text in ASKED[kind].values())


def test_questions_of_a_picture():
    hand = sample("waving hand: dark skin tone", "#1e90ff", concept="1f44b-1f3ff")
    hand.captions["tlh"] = Caption("ghop")  # no questions of ours
    assert picture_questions(hand)[:3] == (
        Question("en", "what is this?", "waving hand", "name"),
        Question("en", "what is the skin tone?", "dark skin tone", "tone"),
        Question("en", "what is the main colour?", "blue", "colour"),
    )
    assert [one.language for one in picture_questions(hand)] == ["en"] * 3 + ["zh"] * 3


def test_questions_of_a_scene():
    placed = [((0, 0), sample("cat")), ((0, 1), sample("dog", "blue")), ((1, 1), sample("fish", "green"))]
    scene = scene_of(placed, "scene", 32)
    assert [(one.question, one.answer) for one in scene.questions if one.language == "en"] == [
        ("how many things are there?", "3"),
        ("what is left of dog?", "cat"),
        ("what is above fish?", "dog"),
    ]
    assert [one.answer for one in scene.questions if one.language == "zh"] == ["3", "中cat", "中dog"]
    image = open_image(scene.require_image())
    middles = [image.getpixel((x, y)) for y in (8, 24) for x in (8, 24)]
    assert middles == [(255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 128, 0)]
    assert (scene.licence, scene.captions) == ("MIT", {})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    splits = {}
    for split, count in (("train", 40), ("test-concept", 6)):
        with ShardWriter(tmp_path / "shards", split) as writer:
            for number in range(count):
                writer.write(sample(f"{split} {number}"))
        splits[split] = writer.shards
    write_manifest(tmp_path / "shards", Manifest("things", 32, splits, {"by": "hand"}))
    return tmp_path / "shards"


def test_build(shards, tmp_path, capsys):
    assert run(["data", "build", "questions", str(shards), "-o", str(tmp_path / "one"), "--scenes", "2"]) == 0
    assert "test-combination: 4 samples" in capsys.readouterr().out
    manifest = build_questions(shards, tmp_path / "two", QuestionSettings(scenes=2))
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert (manifest.image_size, manifest.sources) == (32, {"by": "hand"})
    together = {}
    for split in manifest.splits:
        found = [example.sample for example in open_shards(tmp_path / "one", split, strict=True, captions=False)]
        assert all(one.questions for one in found)
        scenes = [one for one in found if one.id.startswith("scene")]
        asked = [{one.answer for one in scene.questions if one.kind != "count"} for scene in scenes]
        assert all(answer.startswith(("test-concept" if split == "test-concept" else "train", "中")) for some in asked
                   for answer in some)  # fmt: skip
        together[split] = scenes
    assert [len(together[split]) for split in ("train", "test-concept", "test-combination")] == [80, 12, 4]


def test_pairs_are_held_out_in_either_order_and_at_random():
    names = [f"c{number}" for number in range(80)]
    pairs = list(combinations(names, 2))
    held_out = [is_held_out_pair(*pair) for pair in pairs]
    assert held_out == [is_held_out_pair(other, one) for one, other in pairs]
    assert 0.03 < sum(held_out) / len(pairs) < 0.07


def test_scenes_of_training_hold_no_pair_that_is_held_out(shards, tmp_path, monkeypatch):
    drawn = []
    original = scene_of

    def watched(placed, id, size):
        drawn.append((id, [one.base_concept for _, one in placed]))
        return original(placed, id, size)

    monkeypatch.setattr("data.recipes.questions.scene_of", watched)
    build_questions(shards, tmp_path / "out", QuestionSettings(scenes=3))
    for id, concepts in drawn:
        apart = any(is_held_out_pair(*pair) for pair in combinations(concepts, 2))
        assert apart or not id.startswith("scene-test-combination")
        assert not (apart and id.startswith("scene-train"))
    assert sum(id.startswith("scene-test-combination") for id, _ in drawn) == 6


def test_pictures_of_many_sizes_are_refused(shards, tmp_path):
    write_manifest(shards, Manifest("things", None, {}))
    with pytest.raises(DataError, match="pack them with --size"):
        build_questions(shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()
