"""`data build flags` on small packages of the real ones' form."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from data.reading import read_shard
from data.recipes.concepts import Concept, code_points
from data.recipes.flags import build_flags, country_names, framed, region_emoji
from data.recipes.settings import RecipeSettings
from data.recipes.splits import SPLITS, split_of
from data.sample import Caption, DataError, Sample
from data.styles import LANGUAGES
from tests.helpers.npm_packages import replace_pins, write_package

REGIONS = [f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
TRANSLATED = ("zho", "fra", "deu", "ces", "jpn", "kor")
SVG = (
    '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 3 2">'
    '<rect width="3" height="2" fill="#fff"/></svg>'
)


def country(region: str, **names: str) -> dict:
    def entry(language: str) -> dict:
        common = names.get(language, f"{language} {region}")
        return {"common": common, "official": f"Republic of {common}"}

    return {
        "cca2": region.upper(),
        "cca3": f"{region}x".upper(),
        "name": entry("en"),
        "translations": {language: entry(language) for language in TRANSLATED},
    }


def concept(region: str, name: str) -> Concept:
    return Concept(region_emoji(region), dict.fromkeys(LANGUAGES, Caption(f"flag: {name}", ("flag",))))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    icon = {"body": '<path fill="#00f" d="M0 0h16v16H0z"/>'}
    icons = {
        "circle-flags": {"fr": icon, "ar": icon, "lang-fr": icon, "old": {**icon, "hidden": True}},
        "flag": {"aa-1x1": icon, "aa-4x3": icon, "gb-eng-4x3": icon, "arab-4x3": icon},
        "flagpack": {"aa": icon},
        "cif": {"aa": icon},
    }
    members: dict[str, object] = {
        f"json/{prefix}.json": {"prefix": prefix, "info": {"license": {"spdx": "MIT"}}, "icons": found}
        for prefix, found in icons.items()
    }
    flags = {region_emoji(region): region for region in [*REGIONS, "fr", "ar", "gb-eng"]}
    table = {emoji: {"tts": [f"flag: {region}"], "default": ["flag"]} for emoji, region in flags.items()}
    drawings = {f"data/{region}x.svg": SVG for region in REGIONS}
    pins = {
        "ICONS": write_package(folder, "@iconify/json", members),
        "COUNTRIES": write_package(
            folder, "world-countries", {"countries.json": [country(region) for region in REGIONS], **drawings}
        ),
        "NAMES": write_package(
            folder,
            "cldr-annotations-full",
            {f"annotations/{x}/annotations.json": {"annotations": {"annotations": {}}} for x in LANGUAGES},
        ),
        "DERIVED_NAMES": write_package(
            folder,
            "cldr-annotations-derived-full",
            {
                f"annotationsDerived/{x}/annotations.json": {"annotationsDerived": {"annotations": table}}
                for x in LANGUAGES
            },
        ),
    }
    replace_pins(monkeypatch, pins)
    return folder


def build(out: Path, cache: Path, **options) -> dict[str, tuple[str, Sample]]:
    settings = RecipeSettings(**{"size": 32, "workers": 1, "cache": cache, **options})
    manifest = build_flags(out, settings, progress=False)
    return {
        sample.id: (split, sample)
        for split, shards in manifest.splits.items()
        for shard in shards
        for sample in read_shard(out / shard.file, lambda *skip: pytest.fail(str(skip)))
    }


def test_flags_are_the_emoji_of_their_countries(cache: Path, tmp_path: Path) -> None:
    found = build(tmp_path / "a", cache)
    split, sample = found["world-countries-aa"]
    assert (sample.concept, sample.base_concept) == ("1f1e6-1f1e6", "1f1e6-1f1e6")
    assert sample.captions["en"] == Caption("flag: aa", ("flag", "en aa", "Republic of en aa"))
    assert sample.captions["cs"].keywords == ("flag", "ces aa", "Republic of ces aa")
    assert (sample.family, sample.licence, sample.source) == (
        "world-countries", "ODbL-1.0", "npm:world-countries@1.0.0",
    )  # fmt: skip
    families = {key.removesuffix("-aa") for key in found if key.endswith("-aa")}
    assert families == {"world-countries", "flag-1x1", "flag-4x3", "flagpack", "cif"}
    assert found["flag-4x3-gb-eng"][1].captions["en"].name == "flag: gb-eng"
    assert found["circle-flags-fr"][1].captions["en"].keywords == ("flag",)
    assert not found.keys() & {"circle-flags-ar", "circle-flags-lang-fr", "circle-flags-old", "flag-4x3-arab"}
    # the emoji's own splits, so that what is held out there is held out here
    assert {split for split, _ in found.values()} == {*SPLITS}
    for split, sample in found.values():
        assert split == split_of(sample.base_concept or "", sample.family or "")
    build(tmp_path / "b", cache, workers=2)
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab"]
    assert contents[0] == contents[1]


def test_a_white_field_ends_at_a_frame(cache: Path, tmp_path: Path) -> None:
    _, sample = build(tmp_path / "out", cache, size=64)["world-countries-aa"]
    picture = Image.open(io.BytesIO(sample.require_image()))
    column = [picture.getpixel((32, y))[0] for y in range(64)]  # type: ignore[index]
    grey = [y for y, value in enumerate(column) if value < 255]
    # 3 x 2 within a margin of 4 % of the width, in the middle
    assert min(grey) == pytest.approx(12, abs=2)
    assert max(grey) == pytest.approx(52, abs=2)
    assert column[32] == 255 == column[2]


def test_names_that_belong_to_another_country_are_left_out() -> None:
    concepts = {code_points(region_emoji(r)): concept(r, name) for r, name in (("in", "India"), ("io", "Ocean"))}
    names = country_names([country("in", en="India"), country("io", en="India", kor="India")], concepts)
    assert names["in"]["en"] == ("India", "Republic of India")
    assert names["io"]["en"] == ("Republic of India",)
    assert names["io"]["ko"] == ("Republic of India",)


@pytest.mark.parametrize(("region", "emoji"), [("fr", "🇫🇷"), ("gb-eng", "🏴󠁧󠁢󠁥󠁮󠁧󠁿")])
def test_region_emoji(region: str, emoji: str) -> None:
    assert region_emoji(region) == emoji


def test_a_drawing_without_a_size() -> None:
    with pytest.raises(DataError, match="neither a width and height nor a viewBox"):
        framed("<svg><path/></svg>")
