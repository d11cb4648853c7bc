"""Icons of one colour in drawn colours (`data.recipes.monochrome`)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from data.recipes.concepts import Concept
from data.recipes.icons import build_icons
from data.recipes.monochrome import COLOURS, MONOCHROME_SETS, monochrome_name, monochrome_pictures
from data.recipes.rendering import Picture
from data.recipes.settings import IconSettings
from data.recipes.splits import HeldOutNames, split_of
from data.sample import Caption
from data.styles import LANGUAGES
from tests.helpers.npm_packages import replace_pins, write_package

HELD_OUT = next(c for c in map(chr, range(0x1F400, 0x1F500)) if split_of(f"{ord(c):x}", "") == "test-concept")


def sets() -> dict[str, dict[str, Any]]:
    body = {"body": '<path fill="currentColor" d="M2 2h12v12H2z"/>'}
    names = [f"thing-{a}{b}-outline" for a in "abcdefgh" for b in "stuvwxyz"]
    found: dict[str, dict[str, Any]] = {
        prefix: {"prefix": prefix, "info": {"license": {"spdx": "MIT"}}, "icons": {name: dict(body) for name in names}}
        for prefix in MONOCHROME_SETS
    }
    found["mdi"]["icons"] |= {
        "owl": body, "owl-outline": body, "alpha-a": body, "eye-off-outline": body, "github": body,
        "sun": {"body": '<path fill="#f00"/>'},
    }  # fmt: skip
    found["mdi"]["categories"] = {"Brand / Logo": ["github"]}
    return found


def pictures(count: int = 10**6) -> tuple[list[Picture], Counter[str]]:
    skipped: Counter[str] = Counter()
    held_out = HeldOutNames([Concept(HELD_OUT, dict.fromkeys(LANGUAGES, Caption("owl")))])
    return monochrome_pictures(sets(), held_out, count, skipped), skipped


def test_captions_say_the_colours_that_are_drawn() -> None:
    found, skipped = pictures()
    assert skipped == {
        "logo, letter or mark: mdi": 3,
        "may show a concept of test-concept: mdi": 2,
        "has colours of its own: mdi": 1,
    }
    plates: Counter[bool] = Counter()
    for picture in found:
        name = picture.captions["en"].name
        colour, _, ground = name.partition(" on a")
        words = colour.split()
        assert f'fill="{COLOURS[words[0]]}" d="M2 2' in picture.svg
        assert "currentColor" not in picture.svg
        assert picture.base_concept == f"icon-thing-{words[-1]}"
        assert picture.concept == f"icon-{name.replace(' ', '-')}"
        plates[bool(ground)] += 1
        if ground:
            assert f'fill="{COLOURS[ground.split()[-2]]}"' in picture.svg
            assert ground.split()[-2] != words[0]
        else:
            assert words[0] not in ("white", "yellow")  # hardly seen on white
    assert plates[True] / plates.total() == pytest.approx(0.4, abs=0.08)


def test_the_first_by_hash() -> None:
    everything, _ = pictures()
    assert pictures(7)[0] == everything[:7]
    assert pictures()[0] == everything


@pytest.mark.parametrize(
    ("icon", "name"),
    [("anchor-outline", "anchor"), ("cup-hot-24px", "cup hot"), ("solid", "solid"), ("star-filled-small", "star")],
)
def test_monochrome_names(icon: str, name: str) -> None:
    assert monochrome_name(icon) == name


def test_a_build(tmp_path, monkeypatch) -> None:
    table = {HELD_OUT: {"tts": ["owl"]}}
    annotations = {f"annotations/{x}/annotations.json": {"annotations": {"annotations": table}} for x in LANGUAGES}
    derived: dict[str, object] = {
        f"annotationsDerived/{x}/annotations.json": {"annotationsDerived": {"annotations": {}}} for x in LANGUAGES
    }
    pins = {
        "ICONS": write_package(tmp_path, "@iconify/json", {f"json/{p}.json": s for p, s in sets().items()}),
        "NAMES": write_package(tmp_path, "cldr-annotations-full", annotations),
        "DERIVED_NAMES": write_package(tmp_path, "cldr-annotations-derived-full", derived),
    }
    replace_pins(monkeypatch, pins)
    for name, workers in (("a", 1), ("b", 2)):
        settings = IconSettings(size=16, monochrome=20, cache=tmp_path, workers=workers)
        manifest = build_icons(tmp_path / name, settings, progress=False)
        assert (manifest.name, manifest.samples("train"), list(manifest.splits)) == ("monochrome", 20, ["train"])
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab"]
    assert contents[0] == contents[1]
