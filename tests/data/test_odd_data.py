"""Data as users have it: each picture and caption is read right, or skipped, counted and named."""

import io
import json
import tarfile
from pathlib import Path
from typing import Literal

import numpy
import pytest
from PIL import Image

from data.codes import CodedSample
from data.entries import sample_id
from data.pack import PackSettings, pack_samples
from data.reading import (
    BROKEN_SHARD,
    Skip,
    SkipLog,
    expand_shards,
    open_shards,
    read_entries,
    read_shard,
    shard_stem,
    split_name,
)
from data.sample import Caption, DataError, Sample
from data.stats import shard_stats

BOM = "\ufeff"
ShardMode = Literal["w", "w:gz", "w:xz"]


def picture(colour="red", kind="PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, kind)
    return file.getvalue()


def pack(source: Path, **options):
    """The samples by id, and the lines of skipped.log as (reason, name, problem)."""
    out = source.parent / "out"
    pack_samples(source, out, PackSettings(**options), progress=False)
    captions = not options.get("uncaptioned")
    samples = {example.sample.id: example.sample for example in open_shards(out, strict=True, captions=captions)}
    lines = (out / "skipped.log").read_text(encoding="utf-8").splitlines()
    return samples, [tuple(line.split("\t")) for line in lines]


def names(samples: dict[str, Sample]) -> dict[str, str]:
    return {key: sample.captions["und"].name for key, sample in samples.items()}


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "in"
    made.mkdir()
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        (made / f"{name}.png").write_bytes(picture(colour))
    return made


def rows(folder: Path, text: str, name: str = "rows.csv", encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes(text.encode(encoding, "surrogateescape"))
    return folder / name


def write_shard(path: Path, members: dict[str, bytes], mode: ShardMode = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


# tables


def test_rows_that_do_not_fit_the_header_are_skipped_by_name(folder):
    table = rows(folder, "path,caption\na.png,a red, round ball\nb.png\n\nc.png,a green ball\n")
    samples, skipped = pack(table)
    assert names(samples) == {"c": "a green ball"}
    assert [line[:2] for line in skipped] == [("broken row", "rows.csv line 2"), ("broken row", "rows.csv line 3")]
    with pytest.raises(DataError, match=r"^rows\.csv line 2: 3 cells, where the header has 2 columns$"):
        pack_samples(table, folder.parent / "strict", PackSettings(strict=True), progress=False)


def test_a_quotation_mark_that_never_closes_stops(folder):
    table = rows(folder, 'path,caption\na.png,"a red ball\nb.png,a blue ball\n')
    with pytest.raises(DataError, match=r"rows\.csv: a quotation mark opened in line 2 is never closed$"):
        pack(table)
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("end", ['"a blue ball', 'a blue ball"'])
def test_a_quotation_mark_that_closes_too_late_takes_no_rows(folder, end):
    table = rows(folder, f'path,caption\na.png,"a red ball\nb.png,{end}\nc.png,"a green\nball"\n')
    samples, skipped = pack(table)
    assert names(samples) == {"c": "a green\nball"}
    assert [line[:2] for line in skipped] == [("broken row", "rows.csv line 2 to 3")]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (BOM + "path,caption\na.png,Ball ä\n", "utf-8"),
        ("path;caption\r\na.png;Ball ä\r\n", "utf-8"),  # Excel, where numbers have decimal commas
        ("path\tcaption\r\na.png\tBall ä\r\n", "utf-16"),  # Excel's "Unicode text", named .csv
        (" Path , Caption\na.png,Ball ä\n", "utf-8"),
        ("path,caption\na.png,Ball ä\n", "utf-16-le"),  # without a byte order mark
        ("path,caption\na.png,Ball ä\n", "utf-16-be"),
        ("path,caption\na.png,Ball ä\n", "utf-32-le"),
        ("file_name,text\na.png,Ball ä\n", "utf-8"),  # as the datasets library of Hugging Face has it
    ],
)
def test_tables_as_programs_write_them(folder, text, encoding):
    assert names(pack(rows(folder, text, encoding=encoding))[0]) == {"a": "Ball ä"}


def test_rows_of_another_encoding_are_skipped_by_name(folder):
    table = rows(folder, "path,caption\na.png,caf\udce9\nb.png,ball\n")
    samples, skipped = pack(table)
    assert names(samples) == {"b": "ball"}
    assert skipped == [("broken row", "rows.csv line 2", "not UTF-8 text")]


def test_a_cell_that_is_too_long_is_a_row_that_is_skipped(folder):
    samples, skipped = pack(rows(folder, f"path,caption\na.png,{'x' * 200_000}\nb.png,ball\n"))
    assert names(samples) == {"b": "ball"}
    assert skipped == [("broken row", "rows.csv line 2", "a cell of more than 131,072 characters")]


def test_languages_are_one_however_they_are_spelled(folder):
    lines = [
        '{"path": "a.png", "captions": {"EN": ["ball", "globe"], "en": {"name": "sphere", "keywords": ["round"]}}}',
        '{"path": "b.png", "caption": "bola", "language": "pt_br"}',
        '{"path": "c.png", "caption": "球", "questions": [{"question": "a?", "answer": "b", "language": "ZH-hans"}]}',
    ]
    samples, skipped = pack(rows(folder, "\n".join(lines), "rows.ndjson"), language="ZH")
    assert not skipped
    assert samples["a"].captions == {"en": Caption("ball", ("round",), ("globe", "sphere"))}
    assert samples["b"].captions == {"pt-BR": Caption("bola")}
    assert samples["c"].captions == {"zh": Caption("球")}
    assert samples["c"].questions[0].language == "zh-Hans"


def test_two_columns_of_one_name(folder):
    with pytest.raises(DataError, match="two columns 'caption': rename one"):
        pack(rows(folder, "path,caption,caption\na.png,x,y\n"))


def test_lines_of_a_jsonl(folder):
    lines = [
        '{"path": "a.png", "caption": ["a", "b", "a"]}',
        '{"path": "b.png", "caption": {"en": "ball", "de": ["Ball"]}}',
        '{"path": "c.png", "caption": NaN}',
        '{"path": "c.png", "caption": 5}',
        '{"path": "c.png", "caption": null}',
        '{"path": "c.png", "caption": [["c"]]}',
        '{"path": "c.png", "caption": {"a language": "c"}}',
        '{"path": "c.png", "caption": "half \\ud83d"}',
        '{"path": 5, "caption": "c"}',
        '{"path": "c.png", "caption": "c", "language": ["en"]}',
        '{"path": "c.png", "caption": "c\\u0000"}',
        '{"path": "c.png", "caption": "c"',
        "[" * 100_000,
    ]
    lines = [line.replace('"path": "c.png"', f'"id": "c{k}", "path": "c.png"') for k, line in enumerate(lines)]
    samples, skipped = pack(rows(folder, "\n".join(lines), "rows.jsonl"))
    assert samples["a"].captions == {"und": Caption("a", others=("b",))}
    assert samples["b"].captions == {"en": Caption("ball"), "de": Caption("Ball")}
    assert set(samples) == {"a", "b"}
    assert len(skipped) == 11
    assert [name for _, name, _ in skipped[:7]] == [f"c.png (line {line})" for line in (11, *range(3, 9))]  # c10, c2
    # in the codes that a generator trains on, too
    coded = CodedSample(samples["a"], numpy.zeros((1, 1), numpy.uint16))
    assert Sample.from_members("a", coded.sample.to_members()).captions == samples["a"].captions


# files of a folder


def test_suffixes_in_upper_case_and_other_names_of_formats(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, kind in (("A.PNG", "PNG"), ("b.jfif", "JPEG"), ("c.avif", "AVIF"), ("d.Jpe", "JPEG"), ("e", "GIF")):
        (folder / name).write_bytes(picture(kind=kind))
        (folder / f"{Path(name).stem}.{'TXT' if name == 'A.PNG' else 'txt'}").write_bytes(f"{BOM}ball".encode())
    samples, skipped = pack(folder)
    assert names(samples) == dict.fromkeys(["A", "b", "c", "d", "e"], "ball")
    assert not skipped


def test_what_looks_like_data_and_is_none_is_named(folder):
    (folder / "a.txt").write_text("ball")
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "phone.txt").write_text("a telephone")
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    (folder / "notes.md").write_text("not data")
    samples, skipped = pack(folder)
    assert names(samples) == {"a": "ball"}
    assert {name: problem for _, name, problem in skipped} == {
        "b.png": "sample b: no caption in .txt or .json",
        "c.png": "sample c: no caption in .txt or .json",
        "gone.png": "a broken link, or no file",
        "phone.heic": "a picture of a format that is not read: convert it to PNG or JPEG",
        "phone.txt": "no picture of that name beside it",
    }


def test_linked_folders_are_read_once(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "d.png").write_bytes(picture("white"))
    (other / "d.txt").write_text("nothing")
    (folder / "more").symlink_to(other)
    (folder / "loop").symlink_to(folder)
    samples, skipped = pack(folder)
    assert set(samples) == {"more/d"}
    assert ("no picture file", "loop", "a link to a folder that is read already") in skipped


@pytest.mark.parametrize(
    "pair",
    [("क्ति", "कृति"), ("ที่", "ที"), ("😀", "😁"), ("1.5", "1_5"), ("é", "e\u0301"), ("a b", "a\u00a0b"), ("!", "?")],
)
def test_distinct_names_get_distinct_ids(tmp_path, pair):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in pair:
        (folder / f"{name}.png").write_bytes(picture())
        (folder / f"{name}.txt").write_text(name)
    samples, skipped = pack(folder)
    assert sorted(names(samples).values()) == sorted(pair)
    assert not skipped


def test_letters_keep_their_vowel_signs():
    assert sample_id("किताब (1)") == "किताब_1_"


def test_pictures_alone_on_request(folder):
    (folder / "a.txt").write_text("ball")
    with pytest.raises(DataError, match="no caption"):
        pack_samples(folder, folder.parent / "strict", PackSettings(strict=True), progress=False)
    samples, skipped = pack(folder, uncaptioned=True)
    assert set(samples) == {"a", "b", "c"}
    assert not skipped
    counted = shard_stats(folder.parent / "out")
    assert (counted.samples, counted.uncaptioned) == (3, 2)


# shards


@pytest.mark.parametrize(
    ("value", "text"),
    [(5, "5"), (["a", "b"], '["a", "b"]'), ({"a": "ü"}, '{"a": "ü"}'), (True, "true"), (float("nan"), None), ([], None),
     ("half \ud83d", "half \ufffd")],
)  # fmt: skip
@pytest.mark.parametrize("field", ["source", "licence", "family", "concept", "base_concept"])
def test_fields_of_any_type_are_text(field, value, text):
    sample = Sample.from_members("k", {"png": b"", "json": json.dumps({field: value, "caption": "x"}).encode()})
    assert getattr(sample, field) == text


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0"), ("", "k"), (["a"], "k"), (None, "k"), (float("nan"), "k"), ("\ud83d", "\ufffd")]
)
def test_ids_of_any_type(value, expected):
    assert Sample.from_members("k", {"png": b"", "json": json.dumps({"id": value}).encode()}).id == expected


def test_long_ids_are_cut_and_stay_distinct():
    ids = {Sample.from_members("k" * 600 + end, {"png": b""}).id for end in "ab"}
    assert len(ids) == 2
    assert all(len(name) <= 400 for name in ids)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_captions_in_shards_without_their_byte_order_mark(encoding):
    sample = Sample.from_members("k", {"png": b"", "txt": "红色 ball\r\n".encode(encoding)})
    assert sample.captions["und"].name == "红色 ball"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["a", "ab", "a ball: 红色"])
def test_captions_that_never_had_a_byte_order_mark(encoding, text):
    sample = Sample.from_members("k", {"png": b"", "txt": text.encode(encoding)})
    assert sample.captions["und"].name == text


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"PK\x03\x04" + bytes(600), "no tar file but a zip file"),
        (b"PAR1" + bytes(600), "no tar file but a Parquet file"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "no tar file but compressed by zstd"),
        (b"version https://git-lfs.github.com/spec/v1\n", "no tar file but a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>" + b" " * 600, "no tar file but a web page"),
    ],
)
def test_files_in_the_place_of_shards_are_told_for_what_they_are(tmp_path, content, told):
    shard = tmp_path / "0.tar"
    shard.write_bytes(content)
    (skip,) = read_entries(shard)
    assert isinstance(skip, Skip)
    assert skip.reason == BROKEN_SHARD
    assert str(skip.error).startswith(told)


def test_a_caption_cut_inside_an_emoji_is_skipped_by_name(tmp_path):
    members = {"0.png": picture(), "0.json": b'{"caption": "x \\ud83d"}', "1.png": picture(), "1.txt": b"x"}
    shard = write_shard(tmp_path / "0.tar", members)
    (skip, sample) = read_entries(shard)
    assert isinstance(skip, Skip)
    assert isinstance(sample, Sample)
    assert (skip.name, sample.id) == ("0.tar: sample 0", "1")
    assert "half of a surrogate pair" in str(skip.error)


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ({"a.png": picture(), "b.png": picture(), "a.txt": b"x", "b.txt": b"y"}, "tar --sort=name"),
        ({"a.v2.png": picture(), "a.v2.txt": b"x"}, "'v2.png': rename it"),
    ],
)
def test_reasons_point_at_the_cause(tmp_path, members, cause):
    log = SkipLog(tmp_path / "log")
    shard = write_shard(tmp_path / "0.tar", members)
    assert not list(read_shard(shard, lambda reason, name, error: log.add(reason, name, str(error))))
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines
    assert all(cause in line for line in lines)


def test_links_in_a_shard_are_named(tmp_path):
    shard = write_shard(tmp_path / "0.tar", {"a.png": picture(), "a.txt": b"x"})
    with tarfile.open(shard, "a") as tar:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(link)
        text = tarfile.TarInfo("b.txt")
        tar.addfile(text)
    _, skip = read_entries(shard)
    assert isinstance(skip, Skip)
    assert str(skip.error) == "its png is a link: make the shard with `tar --dereference --hard-dereference`"


def fail_on_skip(reason: str, name: str, error: Exception) -> None:
    pytest.fail(f"{name}: {reason}: {error}")


@pytest.mark.parametrize("name", ["train-00000.tar.gz", "train-00000.TAR", "train-00000.tgz", "train-00000.tar.xz"])
def test_compressed_shards_and_suffixes_in_upper_case(tmp_path, name):
    modes: dict[str, ShardMode] = {"gz": "w:gz", "tgz": "w:gz", "xz": "w:xz"}
    write_shard(tmp_path / name, {"a.PNG": picture(), "a.TXT": b"x"}, modes.get(name.rpartition(".")[2], "w"))
    (shard,) = expand_shards(tmp_path, "train")
    assert (shard_stem(shard), split_name(shard)) == ("train-00000", "train")
    assert [sample.id for sample in read_shard(shard, fail_on_skip)] == ["a"]
    shard.write_bytes(shard.read_bytes()[: min(700, shard.stat().st_size // 3)])
    assert [entry.reason for entry in read_entries(shard) if isinstance(entry, Skip)][-1:] == [BROKEN_SHARD]


def test_dots_in_the_names_of_shards():
    assert [shard_stem(Path(name)) for name in ("p.v1.tar", "p.v1.tar.gz", "p.v1")] == ["p.v1"] * 3
