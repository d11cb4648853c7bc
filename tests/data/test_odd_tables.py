"""Tables as people and programs write them: what names a file is read, and what cannot be is told what it is."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from data.pack import pack_samples
from data.reading import NO_EXTENSION, SkipLog, open_shards
from data.sample import DataError
from data.stats import shard_stats


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "path", [" a b.png ", "file://{folder}/a%20b.png", "~/a b.png", r".\a b.png", "sub/../a b.png"]
)
def test_paths_as_they_are_spelled(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "sub").mkdir()
    (tmp_path / "a b.png").write_bytes(png())
    (tmp_path / "t.csv").write_text(f"path , caption\n{path.format(folder=tmp_path)},a cat\n")
    manifest = pack_samples(tmp_path / "t.csv", tmp_path / "out")
    assert (manifest.samples("train"), manifest.skipped) == (1, {})


def test_a_file_of_that_very_name_comes_first(tmp_path: Path) -> None:
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "a.png").write_bytes(png())
    (tmp_path / "t.csv").write_text("path,caption\n~/a.png,a cat\n")
    assert pack_samples(tmp_path / "t.csv", tmp_path / "out").skipped == {}


@pytest.mark.parametrize("url", ["https://example.org/a.png", "http://x/a.png", "s3://bucket/a.png"])
def test_a_url_is_told_to_be_one(url: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "t.csv").write_text(f"path,caption\n{url},a cat\na.png,a dog\n")
    assert pack_samples(tmp_path / "t.csv", tmp_path / "out").skipped == {"missing picture": 1}
    assert f"{url} (line 2)\ta URL, and nothing is fetched" in (tmp_path / "out" / "skipped.log").read_text()


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;"])
def test_excels_line_of_the_separator(first: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "t.csv").write_text(f"{first}\npath;caption\na.png;a cat\nb.png\n")
    assert pack_samples(tmp_path / "t.csv", tmp_path / "out").skipped == {"broken row": 1}
    assert "t.csv line 4\t1 cells" in (tmp_path / "out" / "skipped.log").read_text()


def test_a_list_in_jsonl_is_told_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('[{"path": "a.png", "caption": "a cat"}]')
    with pytest.raises(DataError, match="a JSON list: write one object a line"):
        pack_samples(tmp_path / "t.jsonl", tmp_path / "out")


def test_a_table_in_the_place_of_a_shard(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,caption\n" + "a.png,a cat\n" * 100)
    log = SkipLog(tmp_path / "skipped.log")
    assert shard_stats(tmp_path / "t.csv", log).skipped == {"truncated or broken shard": 1}
    assert "no tar file but text" in (tmp_path / "skipped.log").read_text()


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_members_without_an_extension_are_named(suffix: str, tmp_path: Path) -> None:
    hidden = [("._a", b"Mac"), ("a/._b.png", b"Mac"), ("__meta__", b"")]
    members = [*hidden, ("a/b.png", png()), ("a/b.txt", b"x"), ("a/picture", png())]
    with tarfile.open(tmp_path / f"train-00000{suffix}", "w:gz" if suffix.endswith("gz") else "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    log = SkipLog(tmp_path / "skipped.log")
    assert [example.sample.id for example in open_shards(tmp_path, log=log)] == ["a/b"]
    assert log.counts == {NO_EXTENSION: 1}
    assert f"train-00000{suffix}: a/picture\t" in (tmp_path / "skipped.log").read_text()
    with pytest.raises(DataError, match="a/picture: it is of no sample"):
        list(open_shards(tmp_path, strict=True))
