import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.entries import sample_id
from data.images import open_image
from data.pack import PackSettings, pack_samples
from data.reading import open_shards
from data.sample import Caption, DataError
from data.shards import read_manifest


def picture(number: int, size=(12, 8), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Pictures of four formats with captions in three ways."""
    root = tmp_path / "pictures"
    (root / "sub dir").mkdir(parents=True)
    (root / "b.png").write_bytes(picture(0))
    (root / "b.txt").write_text("a red apple\n", encoding="utf-8")
    (root / "sub dir" / "猫.jpg").write_bytes(picture(1, kind="JPEG"))
    cat = {"zh": {"name": "猫", "keywords": ["动物"]}}
    record = {"captions": cat, "family": "photo", "id": "other", "licence": "MIT"}
    (root / "sub dir" / "猫.json").write_text(json.dumps(record), encoding="utf-8")
    (root / "c.bmp").write_bytes(picture(2, kind="BMP"))
    (root / "c.json").write_text('{"caption": "noise"}')
    (root / "d.png").write_bytes(picture(3, kind="WEBP"))  # the name lies
    (root / "d.txt").write_text("more noise")
    (root / "notes.md").write_text("no picture")
    (root / ".thumbnail.png").write_bytes(b"hidden")
    return root


def run(source, out, **options):
    return pack_samples(source, out, PackSettings(**options), progress=False)


def read(out, split="train"):
    return {example.sample.id: example for example in open_shards(out, split, strict=True)}


def digests(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_folder_keeps_the_bytes(folder, tmp_path):
    manifest = run(folder, tmp_path / "out", language="en")
    found = read(tmp_path / "out")
    assert list(found) == ["b", "c", "d", "sub_dir/猫"]
    assert found["b"].sample.image == picture(0)
    assert found["b"].sample.captions == {"en": Caption("a red apple")}
    assert found["sub_dir/猫"].sample.captions == {"zh": Caption("猫", ("动物",))}
    assert (found["sub_dir/猫"].sample.family, found["sub_dir/猫"].sample.licence) == ("photo", "MIT")
    assert {key: example.sample.extension for key, example in found.items()} == {
        "b": "png",
        "c": "png",
        "d": "webp",
        "sub_dir/猫": "jpg",
    }
    assert found["c"].image.tobytes() == open_image(picture(2, kind="BMP")).tobytes()
    assert manifest == read_manifest(tmp_path / "out")
    assert (manifest.name, manifest.image_size, manifest.skipped) == ("pictures", None, {})
    assert manifest.samples("train") == 4


def test_image_size_and_shard_size(folder, tmp_path):
    manifest = run(folder, tmp_path / "out", image_size=16, samples_per_shard=3)
    assert [shard.samples for shard in manifest.splits["train"]] == [3, 1]
    found = read(tmp_path / "out")
    assert {example.image.size for example in found.values()} == {(16, 16)}
    assert {example.sample.extension for example in found.values()} == {"webp"}
    assert found["b"].sample.captions == {"und": Caption("a red apple")}


def test_two_runs_are_byte_identical(folder, tmp_path):
    (folder / "e.png").write_bytes(b"corrupt")
    (folder / "e.txt").write_text("corrupt")
    (folder / "f.png").write_bytes(picture(9))
    for name in ("one", "two"):
        run(folder, tmp_path / name, image_size=16, test_fraction=0.3)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert sorted(digests(tmp_path / "one")) == ["manifest.json", "skipped.log", "test-00000.tar", "train-00000.tar"]


def write_table(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize(
    ("path_column", "caption_column"), [("path", "caption"), ("image", "text"), ("filepath", "title")]
)
def test_tables(folder, tmp_path, suffix, path_column, caption_column):
    rows = [
        {path_column: "pictures/b.png", caption_column: 'an "apple", red', "id": "", "language": "en", "family": "x"},
        {path_column: "pictures/sub dir/猫.jpg", caption_column: "猫", "id": "cat 1", "language": "zh", "family": ""},
        {path_column: str(folder / "c.bmp"), caption_column: "bruit", "id": "n", "language": "", "family": ""},
    ]
    table = write_table(tmp_path / f"table{suffix}", rows)
    manifest = run(table, tmp_path / "out", language="fr")
    found = read(tmp_path / "out")
    assert sorted(found) == ["cat_1", "n", "pictures/b"]
    assert found["pictures/b"].sample.captions == {"en": Caption('an "apple", red')}
    assert found["pictures/b"].sample.family == "x"
    assert found["cat_1"].sample.captions == {"zh": Caption("猫")}
    assert found["n"].sample.captions == {"fr": Caption("bruit")}
    assert manifest.name == "table"


def test_jsonl_takes_whole_records(folder, tmp_path):
    captions = {"en": {"name": "apple", "keywords": ["red"]}, "de": {"name": "Apfel", "keywords": []}}
    rows = [{"path": "pictures/b.png", "captions": captions, "licence": "CC0-1.0", "source": "here"}]
    run(write_table(tmp_path / "t.jsonl", rows), tmp_path / "out")
    sample = read(tmp_path / "out")["pictures/b"].sample
    assert sample.captions == {"en": Caption("apple", ("red",)), "de": Caption("Apfel")}
    assert (sample.licence, sample.source) == ("CC0-1.0", "here")


def damage(folder):
    (folder / "e.png").write_bytes(picture(5)[:-40])
    (folder / "e.txt").write_text("cut")
    (folder / "f.png").write_bytes(picture(6))
    (folder / "g.png").write_bytes(picture(7, size=(300, 300)))
    (folder / "g.txt").write_text("large")
    (folder / "h.png").write_bytes(picture(8))
    (folder / "h.json").write_text("{broken")
    (folder / "i.png").write_bytes(picture(8))
    (folder / "i.json").write_text('{"caption": "\\ud800"}')


def test_skips_are_counted_and_named(folder, tmp_path):
    damage(folder)
    manifest = run(folder, tmp_path / "out", max_pixels=10_000)
    assert manifest.samples("train") == 4
    assert manifest.skipped == {"corrupt image": 1, "missing or broken caption": 3, "picture too large": 1}
    assert manifest == read_manifest(tmp_path / "out")
    lines = (tmp_path / "out" / "skipped.log").read_text().splitlines()
    assert [line.split("\t")[1] for line in lines] == ["e.png", "f.png", "g.png", "h.png", "i.png"]
    assert str(tmp_path) not in "".join(lines)


def test_a_table_may_name_missing_files(folder, tmp_path):
    rows = [{"path": path, "caption": "x"} for path in ("pictures/b.png", "none.png", "z\0")]
    table = write_table(tmp_path / "t.jsonl", rows)
    assert run(table, tmp_path / "out").skipped == {"missing picture": 2}
    with pytest.raises(DataError, match=r"^none\.png \(line 2\): No such file"):
        run(table, tmp_path / "strict", strict=True)


@pytest.mark.parametrize("name", ["e", "f", "g", "h"])
def test_strict_stops_and_leaves_nothing(folder, tmp_path, name):
    damage(folder)
    for other in {"e", "f", "g", "h", "i"} - {name}:
        (folder / f"{other}.png").unlink()
    with pytest.raises(DataError, match=rf"^{name}\.png: "):
        run(folder, tmp_path / "out", strict=True, max_pixels=10_000)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_equal_pictures_share_a_split(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(100):
        (folder / f"{number:03d}.png").write_bytes(picture(number % 50, size=(4, 4)))
        (folder / f"{number:03d}.txt").write_text("noise")
    manifest = run(folder, tmp_path / "out", test_fraction=0.3)
    train, test = (read(tmp_path / "out", split) for split in ("train", "test"))
    assert manifest.samples("train") + manifest.samples("test") == 100
    assert 10 <= len(test) <= 50
    assert not {e.sample.image for e in train.values()} & {e.sample.image for e in test.values()}


def test_errors_are_one_line_and_leave_nothing(folder, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    (tmp_path / "empty").mkdir()
    columns = write_table(tmp_path / "columns.csv", [{"path": "b.png", "words": "b"}])
    no_path = write_table(tmp_path / "no_path.jsonl", [{"caption": "b"}])
    (tmp_path / "broken.jsonl").write_text("\n{")
    (tmp_path / "list.jsonl").write_text("[]\n")
    (tmp_path / "latin.csv").write_bytes("path,caption\na,é\n".encode("latin-1"))
    (tmp_path / "header.csv").write_text("path,caption\n")
    twice = write_table(tmp_path / "twice.csv", [{"path": "b.png", "caption": c} for c in "xy"])
    gone = write_table(tmp_path / "gone.csv", [{"path": "gone.png", "caption": "x"}])
    before = sorted(tmp_path.rglob("*"))
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (folder, {"image_size": 0}, "image_size must be a whole number from 8 to 4096, not 0"),
        (folder, {"test_fraction": 1.0}, "test_fraction"),
        (folder, {"language": "en us"}, "no language code"),
        (folder, {"samples_per_shard": 0}, "samples_per_shard"),
        (tmp_path / "none", {}, "no folder or file at"),
        (tmp_path / "empty", {}, "holds no picture"),
        (folder / "notes.md", {}, "table of paths and captions"),
        (columns, {}, "needs a column caption or text or title; it has path, words"),
        (no_path, {}, "line 1: no path"),
        (tmp_path / "broken.jsonl", {}, "line 2: not JSON"),
        (tmp_path / "list.jsonl", {}, "line 1: a JSON list: write one object a line"),
        (tmp_path / "latin.csv", {}, "not UTF-8"),
        (tmp_path / "header.csv", {}, "holds no row"),
        (twice, {}, r"b\.png \(line 2\) and b\.png \(line 3\) both get the id 'b'"),
        (gone, {}, r"nothing to pack in .* \(missing picture: 1\)"),
    ]
    for source, options, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            run(source, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="not empty"):
        run(folder, full)
    with pytest.raises(DataError, match="cannot write"):
        run(folder, folder / "b.png" / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_out_is_used(folder, tmp_path):
    (tmp_path / "out").mkdir()
    run(folder, tmp_path / "out")
    assert len(read(tmp_path / "out")) == 4


def test_two_names_of_one_id(folder, tmp_path):
    (folder / "b.jpg").write_bytes(picture(1, kind="JPEG"))
    manifest = run(folder, tmp_path / "out")
    ids = read_ids(manifest, tmp_path / "out")
    assert len(set(ids)) == 5
    assert sum(name.startswith("b-") for name in ids) == 2


def test_sample_ids():
    assert sample_id("a b/c.d(1)") == "a_b/c_d_1_"
    assert sample_id("../x/./y") == "x/y"
    assert sample_id("/abs/e\u0301") == "abs/\u00e9"
    assert sample_id("__MACOSX__/a") == "x__MACOSX__/a"
    assert sample_id("/") == "_"
    long = [sample_id("字" * 80 + end) for end in "ab"]
    assert long[0] != long[1]
    assert all(len(key.encode()) <= 90 for key in long)


def test_long_names_are_packed(folder, tmp_path):
    (folder / ("名" * 70 + ".png")).write_bytes(picture(1))
    (folder / ("名" * 70 + ".txt")).write_text("long")
    assert len(read_ids(run(folder, tmp_path / "out"), tmp_path / "out")) == 5


def read_ids(manifest, out) -> list[str]:
    ids = list(read(out))
    assert len(ids) == manifest.samples("train")
    return ids
