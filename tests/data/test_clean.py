"""`data clean`: each filter on what it should take and what it should leave, then whole runs."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.clean.config import CleanConfig, text_filters
from data.clean.fit import worst_fits
from data.clean.judged import TextFilter
from data.clean.run import clean_data
from data.config import from_dict
from data.reading import read_shard
from data.sample import Caption, DataError, Sample
from data.shards import ShardWriter, read_manifest
from tests.data.test_leaks import drawing, encoded
from tests.helpers.npm_packages import replace_pins, write_package

for module in ("imagehash", "py3langid", "datasketch", "opencc", "phonenumbers"):
    pytest.importorskip(module)

OFF = {name: {"on": False} for name in ("language", "script", "privacy", "words", "near_texts", "near_pictures", "fit")}


def only(name: str, **settings) -> CleanConfig:
    return from_dict(CleanConfig, {**OFF, name: {"on": True, **settings}})


@functools.cache  # the model of languages takes a second to load
def default_filter(name: str) -> TextFilter:
    return text_filters(only(name))[0]


def judge(name: str, text: str, language: str, **settings) -> str | None:
    one = text_filters(only(name, **settings))[0] if settings else default_filter(name)
    return one.judge(text, language)


@pytest.mark.parametrize(
    ("text", "language", "stays"),
    [
        ("a red apple on a wooden table", "en", True),
        ("ein roter Apfel liegt auf dem Tisch", "en", False),
        ("une pomme rouge sur une table en bois", "fr", True),
        ("木桌上的一个红苹果", "zh", True),
        ("赤いりんごが木のテーブルの上にあります", "zh", False),
        ("Apfel", "en", True),  # too short to tell
        ("ein roter Apfel liegt auf dem Tisch", "und", True),
        ("ein roter Apfel liegt auf dem Tisch", "it", True),  # not one of the seven
    ],
)
def test_language(text: str, language: str, stays: bool) -> None:
    assert (judge("language", text, language) == text) == stays


def test_script() -> None:
    assert judge("script", "紅蘋果", "zh") == "红苹果"
    assert judge("script", "紅蘋果", "ja") == "紅蘋果"
    assert judge("script", "红苹果", "zh", conversion="s2t") == "紅蘋果"
    with pytest.raises(ValueError, match="conversion is one of t2s"):
        only("script", conversion="x2y")


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("写信给 li.lei@example.cn 吧", "zh"),
        ("电话 138-0013-8000", "zh"),
        ("身份证 11010519491231002X", "zh"),
        ("call +1 650-253-0000 now", "en"),
        ("appelez le 01 42 68 53 00", "fr"),
        ("Ruf an: 030 901820", "de"),
        ("volejte 224 171 111", "cs"),
        ("電話 03-3211-1111", "ja"),
        ("전화 02-731-2114", "ko"),
        ("the server at 192.168.12.1 is down", "en"),
    ],
)
def test_personal_data_is_dropped(text: str, language: str) -> None:
    assert judge("privacy", text, language) is None


@pytest.mark.parametrize(
    "text",
    ["a clock at 12:30", "version 1.2.3.400", "in 1984", "11010519491231002", "110105194912310021", "red apple @ home"],
)
def test_what_is_not_personal_stays(text: str) -> None:
    assert judge("privacy", text, "en") == text


@pytest.fixture
def lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "npm"
    folder.mkdir()
    listed = {"en": ["badword", "two words"], "zh": ["坏词", "坏"], "de": ["Schimpf"]}
    members = {f"{language}.json": listed.get(language, []) for language in ("zh", "en", "fr", "de", "cs", "ja", "ko")}
    from data.clean import words

    monkeypatch.setattr(words, "LISTED_WORDS", write_package(folder, "naughty-words", members))
    replace_pins(monkeypatch, {})
    return str(folder)


@pytest.mark.parametrize(
    ("text", "language", "stays"),
    [
        ("a Badword here", "en", False),
        ("Two words", "en", False),
        ("badwords", "en", True),  # whole words only
        ("badword", "fr", True),  # another list
        ("这是坏词吗", "zh", False),
        ("坏天气", "zh", True),  # a single character is part of many words
        ("badword", "und", True),
    ],
)
def test_listed_words(lists: str, text: str, language: str, stays: bool) -> None:
    assert (judge("words", text, language, cache=lists) == text) == stays


def test_allowed_words(lists: str) -> None:
    assert judge("words", "a Badword", "en", cache=lists, allowed=["badword"]) == "a Badword"


# whole runs


def write(folder: Path, split: str, samples: list[Sample]) -> Path:
    with ShardWriter(folder, split) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def picture(key: str, seed: int, captions: dict[str, Caption] | None = None, **options) -> Sample:
    extension = options.pop("extension", "png")
    image = encoded(drawing(seed), extension, **options)
    return Sample(key, image, extension, captions or {"en": Caption(key)})


def kept(folder: Path) -> dict[str, Sample]:
    return {
        sample.id: sample
        for shards in read_manifest(folder).splits.values()
        for shard in shards
        for sample in read_shard(folder / shard.file, lambda *skip: pytest.fail(str(skip)))
    }


def test_near_pictures_keep_one_and_that_of_the_test(tmp_path: Path) -> None:
    source = write(tmp_path / "in", "train", [picture(f"p{seed}", seed) for seed in range(8)])
    write(source, "test", [picture("again", 5, extension="jpg", quality=80), picture("new", 50)])
    report = clean_data(source, tmp_path / "out", only("near_pictures"))
    assert (report.read, report.written, report.skipped) == (10, 9, {"near copy of another picture": 1})
    assert kept(tmp_path / "out").keys() == {"p0", "p1", "p2", "p3", "p4", "p6", "p7", "again", "new"}
    log = (tmp_path / "out" / "skipped.log").read_text()
    assert "near copy of another picture\ttrain-00000.tar: p5\tof test-00000.tar: again" in log
    assert read_manifest(tmp_path / "out").skipped == report.skipped


def test_what_stays_does_not_depend_on_the_order(tmp_path: Path) -> None:
    samples = [picture(f"a{seed}", seed) for seed in range(5)]
    samples += [picture(f"b{seed}", seed, extension="jpg", quality=80) for seed in range(5)]
    found = []
    for name, order in (("x", samples), ("y", samples[::-1])):
        clean_data(write(tmp_path / name, "train", order), tmp_path / f"{name}-out", only("near_pictures"))
        found.append(set(kept(tmp_path / f"{name}-out")))
    assert found[0] == found[1]
    assert len(found[0]) == 5


def test_captions_and_keywords_go_alone(tmp_path: Path, lists: str) -> None:
    bad = Caption("call +1 650-253-0000 now", ("x",))
    samples = [
        picture("a", 1, {"en": Caption("an apple", ("fruit", "badword")), "zh": Caption("紅蘋果", ())}),
        picture("b", 2, {"en": bad, "de": Caption("ein Apfel")}),
        picture("c", 3, {"en": bad}),
    ]
    source = write(tmp_path / "in", "train", samples)
    config = from_dict(
        CleanConfig, {"words": {"cache": lists}, "near_pictures": {"on": False, "distance": 4, "colour": 0.03}}
    )
    report = clean_data(source, tmp_path / "out", config)
    found = kept(tmp_path / "out")
    assert found["a"].captions == {"en": Caption("an apple", ("fruit",)), "zh": Caption("红苹果")}
    assert found["b"].captions == {"de": Caption("ein Apfel")}
    assert "c" not in found
    assert report.skipped == {"listed word": 1, "no caption left": 1, "personal data": 2}
    # the log of what was personal does not hold it
    assert "650" not in (tmp_path / "out" / "skipped.log").read_text()


def test_captions_that_fit_least(tmp_path: Path) -> None:
    samples = [picture(f"p{n}", n, {"en": Caption(f"good {n}"), "fr": Caption(f"bon {n}")}) for n in range(10)]
    samples[4].captions["en"] = Caption("wrong")
    source = write(tmp_path / "in", "train", samples)

    def score(images: list[Image.Image], texts: list[str]) -> np.ndarray:
        return np.array([0.0 if text == "wrong" else 1.0 - int(text.split()[1]) / 100 for text in texts], np.float32)

    report = clean_data(source, tmp_path / "out", only("fit", share=0.1), score)
    assert report.skipped == {"caption fits its picture least": 2}
    found = kept(tmp_path / "out")
    assert set(found["p4"].captions) == {"fr"}
    assert set(found["p9"].captions) == {"en"}
    assert worst_fits([("en", 0.5), ("fr", 0.1)], 0.4) == set()


def test_texts(tmp_path: Path) -> None:
    sentence = "the quick brown fox jumps over the lazy dog near the river bank"
    lines = [
        {"text": sentence, "language": "en"},
        {"text": sentence + "!", "language": "en"},
        {"text": "something else altogether, about apples and pears", "language": "en"},
        {"text": sentence, "language": "de"},  # compared within its language alone
        "not a record",
    ]
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("\n".join(json.dumps(line) for line in lines))
    plain = tmp_path / "b-zh.txt"
    plain.write_text("紅蘋果\n\n打电话 138-0013-8000\n", encoding="utf-8")
    near = from_dict(CleanConfig, {**OFF, "near_texts": {"on": True}, "script": {"on": True}, "privacy": {"on": True}})
    report = clean_data([jsonl, plain], tmp_path / "out", near)
    texts = [json.loads(line)["text"] for line in (tmp_path / "out" / "a.jsonl").read_text().splitlines()]
    assert len(texts) == 3
    assert (tmp_path / "out" / "b-zh.txt").read_text(encoding="utf-8") == "红苹果\n"
    assert report.skipped == {
        "broken line": 1, "near copy of another text": 1, "no caption left": 1, "personal data": 1,
    }  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_texts_of_other_encodings(encoding: str, tmp_path: Path) -> None:
    source = tmp_path / "a-zh.TXT"
    source.write_bytes("an apple\n紅蘋果\n".encode(encoding))
    assert clean_data(source, tmp_path / "out", only("script")).written == 2
    assert (tmp_path / "out" / "a-zh.TXT").read_bytes() == "an apple\n红苹果\n".encode()


def test_lines_that_are_no_text_are_skipped_by_name(tmp_path: Path) -> None:
    latin = tmp_path / "a.txt"
    latin.write_bytes(b"caf\xe9\ntea\nN\0L\n")
    lines = tmp_path / "b.ndjson"
    broken = ['{"text": null}', '{"text": 5}', '{"text": ["a"]}', '{"text": "\\ud800"}', "[" * 100_000, "[]", "{}"]
    broken += ['{"text": "a", "language": 7}', '{"text": "a", "language": "English, please"}', '{"text": "\\u0000"}']
    lines.write_text("\n".join(["", *broken, '{"text": "\\u200b"}', '{"text": "ok", "language": "EN"}']))
    report = clean_data([latin, lines], tmp_path / "out", only("script"))
    assert (report.written, report.skipped) == (2, {"broken line": len(broken) + 2})
    assert (tmp_path / "out" / "a.txt").read_text() == "tea\n"
    assert json.loads((tmp_path / "out" / "b.ndjson").read_text()) == {"text": "ok", "language": "en"}
    assert "a.txt:1\tnot UTF-8 text" in (tmp_path / "out" / "skipped.log").read_text()


@pytest.mark.parametrize("content", ["", "\n \n", "call +1 650-253-0000 now\n"])
def test_nothing_left_is_an_error_and_leaves_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(DataError, match="nothing is left to write"):
        clean_data(tmp_path / "a.txt", tmp_path / "out", only("privacy"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_broken_picture_is_left_out(tmp_path: Path) -> None:
    samples = [picture("a", 1), Sample("b", b"corrupt", "png", {"en": Caption("b")})]
    report = clean_data(write(tmp_path / "in", "train", samples), tmp_path / "out", only("near_pictures"))
    assert (report.written, report.skipped) == (1, {"corrupt image": 1})


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="give shards or texts, not both"):
        clean_data([tmp_path / "a.txt", tmp_path], tmp_path / "out", only("script"))
    with pytest.raises(DataError, match="no texts at"):
        clean_data(tmp_path / "b.txt", tmp_path / "out", only("script"))
    assert not (tmp_path / "out").exists()


def test_pictures_survive_byte_for_byte(tmp_path: Path) -> None:
    sample = picture("a", 1)
    clean_data(write(tmp_path / "in", "train", [sample]), tmp_path / "out", only("script"))
    image = kept(tmp_path / "out")["a"].require_image()
    assert image == sample.image
    assert Image.open(io.BytesIO(image)).size == (64, 64)
