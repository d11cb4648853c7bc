"""`data build icons` on small packages of the real ones' form."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from data.reading import read_shard
from data.recipes.concepts import Concept
from data.recipes.icons import FILE_TYPES, ICON_SETS, LOGOS, build_icons, icon_name, icon_pictures
from data.recipes.settings import IconSettings
from data.recipes.splits import HeldOutNames, split_of
from data.sample import Caption, DataError, Sample
from data.shards import read_manifest
from data.styles import LANGUAGES
from tests.helpers.npm_packages import replace_pins, write_package

CHARACTERS = [chr(code) for code in range(0x1F400, 0x1F500)]
HELD_OUT = next(c for c in CHARACTERS if split_of(f"{ord(c):x}", "") == "test-concept")
SEEN = next(c for c in CHARACTERS if split_of(f"{ord(c):x}", "") != "test-concept")


def icon_set(prefix: str, *icons: str, **entries) -> dict:
    body = {"body": '<circle cx="8" cy="8" r="5" fill="#c00"/>'}
    return {
        "prefix": prefix,
        "info": {"license": {"spdx": "MIT"}},
        "icons": {name: dict(body) for name in icons},
        **entries,
    }


def sets() -> dict[str, dict]:
    found = {prefix: icon_set(prefix, "wrench") for prefix in (*ICON_SETS, *FILE_TYPES)}
    found |= {prefix: icon_set(prefix, "somebrand") for prefix in LOGOS}
    found["icon-park"] = icon_set(
        "icon-park", "apple-one", "alarm-clocks", "alarm-clock-off", "google", "five", "bell", "ghost",
        categories={"Foods": ["apple-one"], "Brand": ["google"], "Edit": ["five"]},
    )  # fmt: skip
    found["icon-park"]["icons"]["ghost"]["hidden"] = True
    found["fluent-color"] = icon_set("fluent-color", "wrench-16", "wrench-48", "wrench-20")
    found["flat-ui"] = icon_set("flat-ui", "alarm-clock")
    found["vscode-icons"] = icon_set(
        "vscode-icons", "file-type-rust", "file-type-light-text", "folder-type-docs-opened"
    )
    found["simple-icons"] = icon_set("simple-icons", "rust")
    return found


def held_out() -> HeldOutNames:
    def concept(character: str, name: str, *keywords: str) -> Concept:
        return Concept(character, dict.fromkeys(LANGUAGES, Caption(name, keywords)))

    return HeldOutNames([concept(HELD_OUT, "alarm clock", "bell", "time"), concept(SEEN, "wrench", "tool")])


def pictures(**changes) -> tuple[dict, Counter[str]]:
    skipped: Counter[str] = Counter()
    found = list(icon_pictures({**sets(), **changes}, held_out(), skipped))
    return {picture.id: picture for picture in found}, skipped


def test_names_keywords_and_splits() -> None:
    found, _ = pictures()
    apple = found["icon-park-apple-one"]
    assert apple.captions == {"en": Caption("apple", ("foods",))}
    assert (apple.concept, apple.base_concept, apple.family) == ("icon-apple", "icon-apple", "icon-park")
    assert (apple.split, apple.licence, apple.source[:4]) == ("train", "MIT", "npm:")
    assert found["icon-park-five"].captions["en"] == Caption("five", ())
    # a set of the test split may show anything
    assert found["flat-ui-alarm-clock"].split == "test-icons"
    # one thing by several hands is one concept
    assert found["fluent-color-wrench-48"].concept == found["meteocons-wrench"].concept


def test_what_is_left_out_is_counted() -> None:
    found, skipped = pictures()
    assert skipped == {
        "may show a concept of test-concept: icon-park": 3,  # its name, a longer name and a keyword
        "logo: icon-park": 1,
        "logo: vscode-icons": 1,
        "smaller size: fluent-color": 2,
    }
    shown = {picture.captions["en"].name for picture in found.values() if picture.split == "train"}
    assert shown == {"apple", "five", "wrench", "text", "open docs folder"}
    assert not any(picture.family in LOGOS for picture in found.values())


def test_what_an_animation_lets_appear_is_drawn() -> None:
    rain = icon_set("meteocons")
    rain["icons"]["rain"] = {"body": '<path opacity="0"><animate/></path><path opacity="0"/>'}
    found, _ = pictures(meteocons=rain)
    assert '<path opacity="1"><animate/></path><path opacity="0"/>' in found["meteocons-rain"].svg


@pytest.mark.parametrize(
    ("icon", "prefix", "name"),
    [
        ("apple-whole", "glyphs-poly", "apple whole"),
        ("battery-100", "glyphs-poly", "battery"),
        ("download-alt-5", "marketeq", "download"),
        ("one-one", "icon-park", "one"),
        ("one", "icon-park", "one"),
        ("uv-index-3", "meteocons", "uv index 3"),
        ("hail-fill", "meteocons", "hail"),
        ("person-key-48", "fluent-color", "person key"),
        ("android1", "flat-ui", "android"),
        ("ubmrella", "flat-ui", "umbrella"),
        ("file-type-light-text2", "vscode-icons", "text"),
        ("folder-images-open", "catppuccin", "open images folder"),
        ("default-root-folder-opened", "vscode-icons", "open folder"),
        ("folder", "material-icon-theme", "folder"),
    ],
)
def test_icon_names(icon: str, prefix: str, name: str) -> None:
    assert icon_name(icon, prefix) == name


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    table = {c: {"tts": [name], "default": ["bell"]} for c, name in ((HELD_OUT, "alarm clock"), (SEEN, "wrench"))}
    pins = {
        "ICONS": write_package(folder, "@iconify/json", {f"json/{p}.json": icons for p, icons in sets().items()}),
        "NAMES": write_package(
            folder,
            "cldr-annotations-full",
            {f"annotations/{x}/annotations.json": {"annotations": {"annotations": table}} for x in LANGUAGES},
        ),
        "DERIVED_NAMES": write_package(
            folder,
            "cldr-annotations-derived-full",
            {
                f"annotationsDerived/{x}/annotations.json": {"annotationsDerived": {"annotations": {}}}
                for x in LANGUAGES
            },
        ),
    }
    replace_pins(monkeypatch, pins)
    return folder


def build(out: Path, cache: Path, **options) -> dict[str, list[Sample]]:
    settings = IconSettings(**{"size": 16, "workers": 1, "cache": cache, **options})
    manifest = build_icons(out, settings, progress=False)
    return {
        split: [s for shard in shards for s in read_shard(out / shard.file, lambda *skip: pytest.fail(str(skip)))]
        for split, shards in manifest.splits.items()
    }


def test_two_builds_are_byte_identical(cache: Path, tmp_path: Path) -> None:
    found = build(tmp_path / "a", cache)
    build(tmp_path / "b", cache, workers=2)
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab"]
    assert contents[0] == contents[1]
    assert {sample.family for sample in found["test-icons"]} == {"flat-color-icons", "flat-ui"}
    assert {s.family for s in found["train"]} == {*ICON_SETS} - {"flat-color-icons", "flat-ui"}
    manifest = read_manifest(tmp_path / "a")
    assert (manifest.name, manifest.image_size, manifest.sources) == ("icons", 16, {"@iconify/json": "1.0.0"})


def test_file_types(cache: Path, tmp_path: Path) -> None:
    found = build(tmp_path / "out", cache, file_types=True)
    assert {s.family for s in found["train"]} >= {*FILE_TYPES}


def test_an_existing_output_is_left_alone(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with pytest.raises(DataError, match="choose another folder"):
        build(tmp_path / "out", cache)
