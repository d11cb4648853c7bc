"""What counts as one thing: base concepts, names, the matching of icons, and splits (`data.recipes.concepts`)."""

from collections import defaultdict
from typing import Any

import pytest

from data.recipes.concepts import Concept, match_icons, read_concepts, slug
from data.recipes.emoji import FAMILIES
from data.recipes.splits import split_of
from data.sample import Caption
from data.styles import LANGUAGES

TONES = ["", "\U0001f3fb", "\U0001f3ff"]
WORKERS = [f"{person}{tone}\u200d⚕\ufe0f" for person in "👩👨🧑" for tone in TONES]


def points(character: str) -> str:
    return "-".join(f"{ord(c):x}" for c in character)


def base(character: str) -> str:
    return Concept(character, {}).base


# base concepts


@pytest.mark.parametrize(
    "variants",
    [
        WORKERS,
        ["👋", "👋🏻", "👋🏿"],
        ["👮", "👮🏽", "👮‍♀️", "👮🏿‍♂️"],
        ["👩", "👨", "🧑", "👩🏻", "🧑🏿"],
        ["👦", "👧", "🧒", "🧒🏾"],
        ["👵", "👴", "🧓🏼"],
        ["👩‍🦰", "👨🏻‍🦰", "🧑‍🦰"],
        ["👸", "🤴🏽", "🫅"],
        ["🎅", "🤶🏽", "🧑‍🎄", "🧑🏿‍🎄"],
        ["🤰", "🫃🏻", "🫄"],
        ["👫", "👬", "👭", "👫🏽", "🧑‍🤝‍🧑", "👩🏻‍🤝‍👨🏿", "🧑🏻‍🤝‍🧑🏼"],
        ["👪", "👨‍👩‍👧", "👩‍👩‍👦‍👦", "👨‍👦", "🧑‍🧑‍🧒‍🧒"],
        ["💑", "💑🏽", "👩‍❤️‍👨", "👨‍❤️‍👨", "👩🏻‍❤️‍👩🏿", "🧑🏻‍❤️‍🧑🏼"],
        ["💏", "💏🏽", "👩‍❤️‍💋‍👨", "👨🏻‍❤️‍💋‍👨🏿", "🧑🏻‍❤️‍💋‍🧑🏼"],
        ["🤝", "🤝🏽", "🫱🏻‍🫲🏿"],
        ["👯", "👯‍♀️", "👯🏽‍♂️", "🧑🏻‍🐰‍🧑🏿"],
        ["🤼", "🤼‍♂️", "🧑🏻‍\U0001faef‍🧑🏿"],
        ["🏻", "🏼", "🏿"],
        ["❤️", "❤"],
    ],
    ids=lambda variants: variants[0],
)
def test_skin_tones_and_genders_are_one_base_concept(variants):
    assert len({base(variant) for variant in variants}) == 1


def test_different_things_are_different_base_concepts():
    different = [
        "👩", "👧", "👵", "👩‍⚕️", "👩‍🚀", "👩‍🦰", "👮", "👸", "🎅", "👫", "👪", "💑", "💏", "🤝", "👯", "🤼",
        "❤️", "❤️‍🔥", "❤️‍🩹", "💋", "💛", "🏻", "🐰", "🎄", "👋", "👁️‍🗨️", "🏳️‍🌈", "🏴‍☠️", "🐻‍❄️",
    ]  # fmt: skip
    assert len({base(character) for character in different}) == len(different)


def test_ids_leave_out_the_presentation_selector():
    assert Concept("❤️", {}).id == "2764"
    assert Concept("👩🏻‍⚕️", {}).id == "1f469-1f3fb-200d-2695"
    assert base("👩🏻‍⚕️") == "1f9d1-200d-2695"


# names and matches


@pytest.mark.parametrize(
    ("name", "expected"),
    [("man’s shoe", "mans-shoe"), ("Piñata", "pinata"), ("Mrs. Claus", "mrs-claus"), ("ON! arrow", "on-arrow"),
     ("woman: light skin tone, red hair", "woman-light-skin-tone-red-hair"), ("“reserved” button", "reserved-button")],
)  # fmt: skip
def test_slugs(name, expected):
    assert slug(name) == expected


def annotations(names: dict[str, str]):
    tables = {character: {"tts": [name], "default": ["word", name]} for character, name in names.items()}
    return {language: [tables] for language in LANGUAGES}


def test_only_emoji_named_in_all_languages_are_kept():
    tables = annotations({"❤": "red heart", "😀": "grinning face"})
    tables["ko"] = [{"❤": {"tts": ["빨간 하트"]}, "😀": {"default": ["얼굴"]}}]
    concepts = read_concepts(tables)
    assert list(concepts) == ["2764"]
    assert concepts["2764"].captions["ko"] == Caption("빨간 하트")
    assert concepts["2764"].captions["en"] == Caption("red heart", ("word", "red heart"))


def test_icons_are_matched_in_order_of_trust():
    concepts = read_concepts(annotations({"❤": "red heart", "😀": "grinning face", "⏰": "alarm clock", "🐟": "fish"}))
    icons: dict[str, dict[str, Any]] = {
        # `chars` outweighs the name, with and without fe0f
        "own": {"icons": {"grinning-face": {}, "x": {}}, "chars": {"2764-fe0f": "grinning-face", "1f600": "x"}},
        "slugs": {"icons": {"red-heart": {}, "alarm-clock": {}, "nothing": {}}},
        "letters": {"icons": {"alarmclock": {}}},
        "shared": {"icons": {"x": {}, "y": {}, "z": {}}},
        "source": {
            "icons": {"fishy": {}},
            "chars": {"1f41f": "fishy"},
            "aliases": {"y": {"parent": "fishy"}, "z": {"parent": "fishy", "hFlip": True}},
        },
        "twice": {"icons": {"fish": {}, "fishy": {}}},
    }
    assert match_icons(icons, concepts) == {
        "own": {"grinning-face": "2764", "x": "1f600"},
        "slugs": {"red-heart": "2764", "alarm-clock": "23f0"},
        "letters": {"alarmclock": "23f0"},
        "shared": {"x": "1f600", "y": "1f41f"},
        "source": {"fishy": "1f41f"},
        "twice": {"fish": "1f41f"},  # one icon for each concept
    }


# splits


def test_a_split_is_decided_by_base_concept_and_family_alone():
    shares: dict[str, int] = defaultdict(int)
    everything = [chr(code) for code in range(0x1F300, 0x1FA00)]
    for character in everything:
        splits = {family: split_of(Concept(character, {}).base, family) for family in FAMILIES}
        if "test-concept" in splits.values():
            assert set(splits.values()) == {"test-concept"}
        for split in splits.values():
            shares[split] += 1
    total = sum(shares.values())
    assert shares["test-concept"] / total == pytest.approx(0.05, abs=0.02)
    assert shares["test-family"] / total == pytest.approx(0.05, abs=0.02)
    for family in FAMILIES:
        assert len({split_of(Concept(character, {}).base, family) for character in WORKERS}) == 1
