import hashlib
import io
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

from data.reading import read_shard
from data.recipes import emoji, npm
from data.recipes.concepts import Concept
from data.recipes.emoji import FAMILIES, EmojiSettings, build_emoji
from data.recipes.npm import Package
from data.recipes.rendering import Picture
from data.recipes.splits import split_of
from data.sample import Caption, DataError
from data.shards import read_manifest
from data.styles import LANGUAGES
from data.text import TextTokenizer
from tests.helpers.npm_packages import replace_pins, write_package

TONES = ["", "\U0001f3fb", "\U0001f3ff"]
# plain things, and one person in every gender and tone
THINGS = [chr(code) for code in range(0x1F400, 0x1F440)]
WORKERS = [f"{person}{tone}\u200d⚕\ufe0f" for person in "👩👨🧑" for tone in TONES]
WITHOUT_PICTURE = "🍭"  # its icon does not render


def points(character: str) -> str:
    return "-".join(f"{ord(c):x}" for c in character)


# a build from small packages with the layout of the real ones


def svg_body(number: int, family: str) -> str:
    colour = hashlib.sha256(f"{family} {number}".encode()).hexdigest()[:6]
    return f'<circle cx="8" cy="8" r="{3 + number % 5}" fill="#{colour}"/>'


def icon_set(family: str, characters: list[str]) -> dict:
    names = {character: f"icon-{points(character.replace(chr(0xFE0F), ''))}" for character in characters}
    icons: dict[str, dict] = {name: {"body": svg_body(n, family)} for n, name in enumerate(names.values())}
    if family == "twemoji":
        icons["unknown-thing"] = {"body": svg_body(0, family)}
        icons[names[WITHOUT_PICTURE]] = {"body": "<circle"}
    if family == "noto":
        icons[names[WITHOUT_PICTURE]] = {"body": ""}
    return {
        "prefix": family,
        "info": {"name": family, "license": {"title": "MIT", "spdx": "MIT"}},
        "icons": icons,
        "width": 16,
        "height": 16,
        "chars": {points(character): name for character, name in names.items()},
    }


def write_packages(folder: Path) -> dict[str, Package]:
    folder.mkdir(parents=True)
    characters = [*THINGS, *WORKERS, WITHOUT_PICTURE]
    words = {"zh": "图", "en": "thing", "fr": "chose", "de": "Ding", "cs": "věc", "ja": "物", "ko": "것", "it": "cosa"}

    def table(chosen: list[str], language: str) -> dict:
        # CLDR leaves out the presentation selector
        return {
            character: {
                "default": [words[language], f"{words[language]} {number}"],
                "tts": [f"{words[language]} {character} {number}"],
            }
            for number, character in enumerate(c.replace("\ufe0f", "") for c in chosen)
        }

    return {
        "ICONS": write_package(folder, "@iconify/json", {f"json/{f}.json": icon_set(f, characters) for f in FAMILIES}),
        "NAMES": write_package(
            folder,
            "cldr-annotations-full",
            {
                f"annotations/{language}/annotations.json": {
                    "annotations": {"annotations": table([*THINGS, WITHOUT_PICTURE], language)}
                }
                for language in (*LANGUAGES, "it")
            },
        ),
        "DERIVED_NAMES": write_package(
            folder,
            "cldr-annotations-derived-full",
            {
                f"annotationsDerived/{language}/annotations.json": {
                    "annotationsDerived": {"annotations": table(WORKERS, language)}
                }
                for language in LANGUAGES
            },
        ),
    }


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    cache = tmp_path_factory.mktemp("npm") / "cache"
    return cache, write_packages(cache)


@pytest.fixture
def cache(packages, monkeypatch):
    """The small packages in place of the pinned ones; no process may be started to fetch anything."""
    folder, pins = packages
    replace_pins(monkeypatch, pins)

    def refuse(*args, **kwargs):
        raise AssertionError("the build started a process")

    monkeypatch.setattr(npm.subprocess, "run", refuse)
    return folder


def build(out, cache, **options):
    settings = {"size": 16, "samples_per_shard": 100, "workers": 1, "cache": cache, **options}
    return build_emoji(out, EmojiSettings(**settings), progress=False)


@pytest.fixture(scope="module")
def built(packages, tmp_path_factory):
    folder, pins = packages
    out = tmp_path_factory.mktemp("built") / "emoji"
    with pytest.MonkeyPatch.context() as patch:
        replace_pins(patch, pins)
        build(out, folder)
    return out


def samples(folder, split):
    for shard in read_manifest(folder).splits[split]:
        yield from read_shard(folder / shard.file, lambda reason, name, error: pytest.fail(f"{name}: {reason}"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_two_builds_are_byte_identical(built, cache, tmp_path):
    # another number of workers, another working folder
    build(tmp_path / "again", cache, workers=2)
    assert contents(tmp_path / "again") == contents(built)
    assert (built.stat().st_mode & 0o777) == 0o755


def test_what_a_build_holds(built):
    manifest = read_manifest(built)
    assert (manifest.name, manifest.image_size) == ("emoji", 16)
    assert manifest.sources == {
        "@iconify/json": "1.0.0", "cldr-annotations-full": "1.0.0", "cldr-annotations-derived-full": "1.0.0",
    }  # fmt: skip
    files = {shard.file for shards in manifest.splits.values() for shard in shards}
    assert files | {"manifest.json", "text.model"} == set(contents(built))
    for shards in manifest.splits.values():
        for shard in shards:
            data = (built / shard.file).read_bytes()
            assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    # every picture is in a split or counted as skipped
    total = sum(manifest.samples(split) for split in manifest.splits)
    assert total + 2 == len(FAMILIES) * len([*THINGS, *WORKERS, WITHOUT_PICTURE])


def test_skipped_icons_are_counted_by_name(built):
    skipped = read_manifest(built).skipped
    assert skipped["no name: twemoji"] == 1
    assert skipped["no name: noto"] == 0
    failed = sorted(reason for reason in skipped if reason.startswith("render failed"))
    assert failed[0] == f"render failed: noto-{points(WITHOUT_PICTURE)}: the picture is empty"
    assert failed[1].startswith(f"render failed: twemoji-{points(WITHOUT_PICTURE)}: ")
    assert len(failed) == 2
    assert not any("\n" in reason for reason in skipped)


def test_a_sample_of_a_build(built):
    found = {sample.id: sample for split in read_manifest(built).splits for sample in samples(built, split)}
    sample = found[f"noto-{points('👩🏻‍⚕')}"]
    assert (sample.family, sample.licence, sample.source) == ("noto", "MIT", "npm:@iconify/json@1.0.0")
    assert (sample.concept, sample.base_concept) == ("1f469-1f3fb-200d-2695", "1f9d1-200d-2695")
    assert set(sample.captions) == set(LANGUAGES)
    assert sample.captions["de"] == Caption("Ding 👩🏻‍⚕ 1", ("Ding", "Ding 1"))
    assert sample.extension == "webp"
    image = Image.open(io.BytesIO(sample.image))
    assert (image.size, image.mode) == ((16, 16), "RGB")
    assert image.getpixel((0, 0)) == (255, 255, 255)
    number = (THINGS + WORKERS).index("👩🏻‍⚕\ufe0f")
    colour = hashlib.sha256(f"noto {number}".encode()).hexdigest()[:6]
    assert image.getpixel((8, 8)) == tuple(bytes.fromhex(colour))  # lossless


def test_splits_of_a_build(built):
    where: dict[str, set[str]] = defaultdict(set)
    pairs: dict[tuple, set[str]] = defaultdict(set)
    manifest = read_manifest(built)
    assert list(manifest.splits) == ["train", "test-concept", "test-family"]
    for split in manifest.splits:
        found = list(samples(built, split))
        assert len(found) == manifest.samples(split) > 0
        for sample in found:
            where[sample.base_concept or ""].add(split)
            pairs[sample.base_concept, sample.family].add(split)
    # all tones and genders of a concept in a family lie together
    assert all(len(splits) == 1 for splits in pairs.values())
    for splits in where.values():
        assert splits == {"test-concept"} or "test-concept" not in splits
        assert "test-family" not in splits or "train" in splits


def test_the_text_model_knows_captions_and_styles(built):
    text = TextTokenizer(built / "text.model")
    assert len(text.encode("thing, noto style")) < 10
    assert text.decode(text.encode("věc, styl noto")) == "věc, styl noto"


def test_the_text_model_never_sees_held_out_concepts(monkeypatch):
    captions = {language: Caption(f"{language} name", ("word",)) for language in LANGUAGES}
    characters = THINGS + [chr(code) for code in range(0x1F300, 0x1F400)]
    pictures = []
    for character in characters:
        concept = Concept(character, {**captions, "en": Caption(f"secret {character}")})
        split = split_of(concept.base, "noto")
        pictures.append(
            Picture("", "", concept.captions, "noto", concept.id, concept.base, split, licence="MIT", source="")
        )
    text = "\n".join(emoji.caption_corpus(pictures))
    for character, shown in zip(characters, pictures, strict=True):
        assert (f"secret {character}" in text) == (shown.split == "train")


def test_png_and_families(cache, tmp_path):
    manifest = build(tmp_path / "out", cache, format="png", families=("noto", "openmoji"), size=24)
    found = [sample for split in manifest.splits for sample in samples(tmp_path / "out", split)]
    assert {sample.family for sample in found} == {"noto", "openmoji"}
    assert {sample.extension for sample in found} == {"png"}
    assert Image.open(io.BytesIO(found[0].image)).size == (24, 24)


def test_limit_is_the_start_of_the_whole(built, cache, tmp_path):
    manifest = build(tmp_path / "out", cache, limit=30)
    assert sum(manifest.samples(split) for split in manifest.splits) == 30
    for split in manifest.splits:
        limited, whole = list(samples(tmp_path / "out", split)), list(samples(built, split))
        assert limited == whole[: len(limited)]
    assert (tmp_path / "out" / "text.model").read_bytes() == (built / "text.model").read_bytes()


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"size": 4}, "size must be a whole number from 8 to 2048, not 4"),
        ({"size": 4096}, "size must be a whole number from 8 to 2048, not 4096"),
        ({"format": "gif"}, "'webp' or 'png', not 'gif'"),
        ({"families": ("noto", "nato")}, "unknown family nato; known: openmoji"),
        ({"samples_per_shard": 0}, "at least 1, not 0"),
        ({"limit": 0}, "limit must be a whole number of at least 1, not 0"),
        ({"limit": -1}, "limit must be a whole number of at least 1, not -1"),
    ],
)
def test_bad_arguments(cache, tmp_path, options, problem):
    with pytest.raises(DataError, match=problem) as error:
        build(tmp_path / "out", cache, **options)
    one_line(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_existing_output_is_left_alone(cache, tmp_path, kind):
    out = tmp_path / "out"
    kept = out if kind == "file" else out / "kept"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(DataError, match="not empty: choose another folder"):
        build(out, cache)
    assert kept.read_text() == "mine"


def test_a_failure_leaves_nothing_behind(cache, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(emoji, "write_manifest", fail)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", cache, limit=5)
    assert list(tmp_path.iterdir()) == []


# the npm client


def fake_npm(folder: Path, script: str) -> Path:
    """A stand-in for the npm client; its arguments are `pack NAME@VERSION --pack-destination FOLDER --silent`."""
    folder.mkdir(exist_ok=True)
    path = folder / "npm"
    path.write_text(f"#!{sys.executable}\nimport pathlib, shutil, sys\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_missing_npm_client(packages, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="npm client was not found; install Node.js") as error:
        build_emoji(tmp_path / "out", EmojiSettings(cache=tmp_path / "cache"), progress=False)
    assert "iconify-json-2.2.535.tgz" in one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_a_package_is_fetched_once_and_checked(packages, tmp_path, monkeypatch):
    source, pins = packages
    package = pins["NAMES"]
    script = f"shutil.copy({str(source / package.tarball)!r}, sys.argv[4]); print(sys.argv[1:])"
    monkeypatch.setenv("PATH", str(fake_npm(tmp_path / "bin", script).parent))
    found = npm.fetch_package(package, tmp_path / "cache")
    assert found.read_bytes() == (source / package.tarball).read_bytes()
    assert list((tmp_path / "cache").iterdir()) == [found]
    monkeypatch.setenv("PATH", "")
    assert npm.fetch_package(package, tmp_path / "cache") == found


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("sys.exit('npm error code E404\\nnpm error 404 Not Found')", "npm error code E404"),
        ("sys.exit(3)", "no tarball"),
        ("pass", "no tarball"),
        ("pathlib.Path(sys.argv[4], 'x.tgz').write_bytes(b'other')", "is not the pinned"),
    ],
)
def test_npm_failing_is_one_line(packages, tmp_path, monkeypatch, script, problem):
    monkeypatch.setenv("PATH", str(fake_npm(tmp_path / "bin", script).parent))
    with pytest.raises(DataError) as error:
        npm.fetch_package(packages[1]["NAMES"], tmp_path / "cache")
    assert problem in one_line(error)
    assert "cldr-annotations-full@1.0.0" in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_changed_package_is_one_line(packages, cache, tmp_path):
    changed = shutil.copytree(cache, tmp_path / "cache")
    path = changed / packages[1]["ICONS"].tarball
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"is not the pinned @iconify/json@1\.0\.0.*delete it") as error:
        build(tmp_path / "out", changed)
    assert str(path) in one_line(error)
    assert not (tmp_path / "out").exists()


def test_a_package_of_another_layout_is_one_line(cache, tmp_path, monkeypatch):
    other = shutil.copytree(cache, tmp_path / "cache")
    replace_pins(monkeypatch, {"NAMES": write_package(other, "cldr-annotations-full", {"annotations/de.json": {}})})
    with pytest.raises(DataError, match="has changed: it does not hold annotations/cs/annotations.json") as error:
        build(tmp_path / "out", other)
    one_line(error)


def test_packages_are_kept_in_the_cache_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert npm.default_cache() == tmp_path / "mmwudao" / "npm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert npm.default_cache() == Path.home() / ".cache" / "mmwudao" / "npm"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm client on this machine")
def test_the_real_packages_build_twice_alike(tmp_path):
    command = [sys.executable, "-m", "mmwudao", "data", "build", "emoji", "--limit", "200", "--out"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for name in ("a", "b"):
        subprocess.run([*command, str(tmp_path / name)], check=True, env=environment, timeout=1500)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    manifest = read_manifest(tmp_path / "a")
    assert 190 <= sum(manifest.samples(split) for split in manifest.splits) <= 200
    assert manifest.image_size == 128
