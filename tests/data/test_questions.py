"""Questions about pictures: in shards, codes and tables, and `data build easy-vqa` on a small wheel."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from PIL import Image

from data.augment import may_be_mirrored
from data.codes import CodedSample, read_codes
from data.pack import pack_samples
from data.reading import Skip, open_shards, read_entries
from data.recipes import easy_vqa as recipe
from data.recipes.easy_vqa import build_easy_vqa
from data.recipes.pypi import Wheel
from data.recipes.settings import EasyVqaSettings
from data.sample import Caption, DataError, Question, Sample
from data.settings import PackSettings
from data.shards import Manifest, ShardWriter, file_sha256, write_manifest
from data.text import TextTokenizer
from mmwudao.cli.app import run

ASKED = (Question("en", "what colour is it?", "red", "colour"), Question("zh", "这是什么？", "苹果"))


def from_record(questions: object) -> Sample:
    return Sample.from_members("k", {"png": b"x", "json": json.dumps({"questions": questions}).encode()})


def test_questions_come_back_from_shards_and_from_codes(tmp_path):
    sample = Sample("s", b"x", "png", questions=ASKED)
    assert Sample.from_members("s", sample.to_members()) == sample
    coded = CodedSample(replace(sample, image=None, extension=""), numpy.zeros((2, 2), numpy.uint16))
    with ShardWriter(tmp_path, "train") as writer:
        writer.write_members("s", coded.to_members())
    write_manifest(tmp_path, Manifest("asked", 16, {"train": writer.shards}, {"tokenizer": "cafe"}))
    assert [one.sample.questions for one in read_codes(tmp_path, "train")] == [ASKED]


def test_a_question_may_lack_its_language_and_kind():
    asked = [{"question": " is it red? ", "answer": "\ufeffyes"}]
    assert from_record(asked).questions == (Question("und", "is it red?", "yes"),)
    assert from_record(None).questions == from_record([]).questions == ()


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ("what?", "'questions' is no list of objects"),
        (["what?"], "question 1 needs one 'question' and one 'answer'"),
        ([{"question": "a?", "answer": "b"}, {"question": "what?"}], "question 2 needs one"),
        ([{"question": "what?", "answer": " "}], "each a text that is not blank"),
        ([{"question": "what?", "answer": ["a", "b"]}], "needs one 'question' and one 'answer'"),
        ([{"question": "what?", "answer": 3}], "question 1: its answer is no text but 3"),
        ([{"question": "\ud83d", "answer": "b"}], "question 1: its question is not valid Unicode"),
        ([{"question": "a?", "answer": "b", "language": "english!"}], "question 1: 'english!' is no language code"),
    ],
)
def test_bad_questions_are_refused_by_name(questions, message):
    with pytest.raises(DataError, match=f"^sample k: {message}" if message.startswith("q") else message) as error:
        from_record(questions)
    assert "\n" not in str(error.value)


def test_a_bad_question_skips_its_sample_by_name(tmp_path):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write_members("good", {**Sample("good", b"x", "png", questions=ASKED).to_members()})
        writer.write_members("bad", {"png": b"x", "json": b'{"questions": [{"question": "a?"}]}'})
    good, bad = sorted(read_entries(tmp_path / "train-00000.tar", captions=False), key=lambda one: type(one).__name__)
    assert isinstance(good, Sample)
    assert isinstance(bad, Skip)
    assert "bad" in bad.name
    assert "needs one 'question'" in str(bad.error)


def test_questions_of_a_table_are_packed(tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    row = {"path": "a.png", "questions": [{"question": "red?", "answer": "yes", "language": "en", "kind": "yes-no"}]}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    pack_samples(tmp_path / "t.jsonl", tmp_path / "out", PackSettings(test_fraction=0), progress=False)
    (example,) = open_shards(tmp_path / "out", strict=True, captions=False)
    assert example.sample.questions == (Question("en", "red?", "yes", "yes-no"),)


def test_a_picture_asked_about_directions_is_not_mirrored():
    plain = Sample("s", b"", "png", {"en": Caption("a cat and a dog")})
    assert may_be_mirrored(replace(plain, questions=(Question("en", "is there a cat?", "yes"),)))
    assert not may_be_mirrored(replace(plain, questions=(Question("en", "what is left of the cat?", "a dog"),)))
    assert not may_be_mirrored(Sample("s", b"", "png", questions=ASKED))


# easy-VQA


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a small wheel of the real one's form."""
    folder = tmp_path / "cache"
    folder.mkdir()
    wheel = Wheel("easy-vqa", "1.0", "py3-none-any", "")
    with zipfile.ZipFile(folder / wheel.file, "w") as file:
        for split, count in (("train", 6), ("test", 3)):
            asked = []
            for number in range(count):
                buffer = io.BytesIO()
                Image.new("RGB", (64, 64), (40 * number, 90, 0)).save(buffer, "PNG")
                file.writestr(f"easy_vqa/data/{split}/images/{number}.png", buffer.getvalue())
                asked += [["what is the red shape?", "circle", number], ["what color is the circle?", "red", number]]
                asked += [[f"is there a {colour} shape?", "no", number] for colour in ("blue", "green")]
            file.writestr(f"easy_vqa/data/{split}/questions.json", json.dumps(asked))
    monkeypatch.setattr(recipe, "EASY_VQA", replace(wheel, sha256=file_sha256(folder / wheel.file)))
    return folder


def test_build(cache, tmp_path, capsys):
    assert run(["data", "build", "easy-vqa", "-o", str(tmp_path / "one"), "--cache", str(cache)]) == 0
    assert "train: 6 samples" in capsys.readouterr().out
    manifest = build_easy_vqa(tmp_path / "two", EasyVqaSettings(cache=cache))
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert (manifest.name, manifest.image_size, manifest.sources) == ("easy-vqa", 64, {"easy-vqa": "1.0"})
    assert {split: manifest.samples(split) for split in manifest.splits} == {"train": 6, "test": 3}
    examples = list(open_shards(tmp_path / "one", "test", strict=True, captions=False))
    sample, image = examples[1]
    assert (sample.id, sample.licence, sample.source) == ("easy-vqa-test-00001", "MIT", "pypi:easy-vqa@1.0")
    assert (image.size, image.getpixel((0, 0))) == ((64, 64), (40, 90, 0))
    assert [one.kind for one in sample.questions] == ["shape", "colour", "yes-no", "yes-no"]
    text = TextTokenizer(tmp_path / "one" / "text.model")
    assert text.decode(text.encode("what is the red shape?")) == "what is the red shape?"


def test_some_pictures_only(cache, tmp_path):
    manifest = build_easy_vqa(tmp_path / "few", EasyVqaSettings(cache=cache, limit=2))
    assert {split: manifest.samples(split) for split in manifest.splits} == {"train": 2, "test": 2}


def test_a_wheel_of_another_form_is_one_line(cache, tmp_path, monkeypatch):
    with zipfile.ZipFile(cache / recipe.EASY_VQA.file, "w") as file:
        file.writestr("easy_vqa/data/train/questions.json", '[["what?", "circle", 7]]')
    monkeypatch.setattr(recipe, "EASY_VQA", replace(recipe.EASY_VQA, sha256=file_sha256(cache / recipe.EASY_VQA.file)))
    with pytest.raises(DataError, match="not of the known form"):
        build_easy_vqa(tmp_path / "out", EasyVqaSettings(cache=cache))
    assert not (tmp_path / "out").exists()


def test_a_limit_out_of_range():
    with pytest.raises(DataError, match="limit must be"):
        EasyVqaSettings(limit=0)
