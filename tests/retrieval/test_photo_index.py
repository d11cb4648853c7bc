"""The collection of a folder of pictures follows the folder, whatever happens to either."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.photos.files import PhotoSettings
from data.sample import DataError
from retrieval.collections.opening import CollectionError, open_collection
from retrieval.photos import indexing
from retrieval.photos.indexing import PhotoReport, PhotoRequest, index_photos
from retrieval.photos.places import default_place, find_place, path_of, photo_id, read_place, stored_path
from tests.helpers.colour_towers import COLOURS, ColourTowers
from tests.helpers.photos import save_colour

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def data_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path):
    for name in ("red", "green", "blue"):
        save_colour(tmp_path / "pics" / f"{name}.png", name)
    return tmp_path / "pics"


def index(folder, **request) -> PhotoReport:
    return index_photos(ColourTowers, PhotoRequest(folder, workers=1, **request))


def ids(folder) -> list[str]:
    with open_collection(default_place(folder)) as collection:
        return sorted(name for names, _ in collection.scan() for name in names)


def changes(report):
    return report.added, report.changed, report.moved, report.dropped


def test_a_folder_is_followed(folder, monkeypatch):
    first = index(folder)
    assert (first.items, changes(first)) == (3, (3, 0, 0, 0))
    monkeypatch.setattr(indexing, "PhotoDecoder", None)  # nothing is opened when nothing has changed
    assert changes(index(folder)) == (0, 0, 0, 0)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_DATA_HOME", str(folder.parent / "home"))
    save_colour(folder / "sub" / "日の出 ☀.png", "yellow")
    save_colour(folder / "red.png", "magenta", (40, 40))
    (folder / "green.png").unlink()
    (folder / "blue.png").rename(folder / "moved.png")
    assert changes(index(folder)) == (1, 1, 1, 2)
    assert ids(folder) == ["moved.png", "red.png", "sub/日の出 ☀.png"]
    with open_collection(default_place(folder)) as collection:
        hits = collection.search(ColourTowers().encode_text(["blue"])[0].numpy(), 1)
        assert hits[0].id == "moved.png"
        red = collection.get(["red.png"])[0]
        assert red.vector @ ColourTowers().encode_text(["magenta"])[0].numpy() > 0.999
        assert red.metadata["size"] == (folder / "red.png").stat().st_size


def test_a_new_time_alone_embeds_nothing_again(folder, monkeypatch):
    index(folder)
    os.utime(folder / "red.png", (1, 1))
    monkeypatch.setattr(ColourTowers, "encode_pixels", None)
    assert changes(index(folder)) == (0, 0, 0, 0)
    with open_collection(default_place(folder)) as collection:
        assert collection.get(["red.png"])[0].metadata["changed"] == 10**9


def test_unreadable_pictures_are_counted_and_named(folder):
    (folder / "bad\nname.jpg").write_bytes(b"no picture")
    (folder / "empty.heic").touch()
    report = index(folder)
    assert (report.items, report.skipped) == (3, {"corrupt image": 2})
    log = Path(report.log).read_text().splitlines()
    assert [line.split("\t")[1] for line in log] == ["bad name.jpg", "empty.heic"]
    # what was a picture and is none any more is dropped
    (folder / "red.png").write_bytes(b"broken")
    assert changes(index(folder)) == (0, 0, 0, 1)
    save_colour(folder / "red.png", "red")
    (folder / "empty.heic").unlink()
    (folder / "bad\nname.jpg").unlink()
    repaired = index(folder)
    assert (changes(repaired), repaired.skipped) == ((1, 0, 0, 0), {})
    assert Path(report.log).read_text() == ""


def test_names_that_are_not_utf8_and_long_ones(folder):
    raw = os.fsencode(folder) + b"/caf\xe9.png"
    try:
        shutil.copy(folder / "red.png", raw)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    deep = folder / Path(*["d" * 200] * 3)
    save_colour(deep / "a.png", "blue")
    assert index(folder).items == 5
    place = find_place(folder)
    with open_collection(place.collection) as collection:
        hits = collection.search(ColourTowers().encode_text(["red"])[0].numpy(), 9)
        assert {os.fsencode(place.photo(hit)) for hit in hits[:2]} == {raw, os.fsencode(folder / "red.png")}
        assert all(place.photo(hit).is_file() for hit in hits)
        assert max(len(hit.id) for hit in hits) == 512
    assert changes(index(folder)) == (0, 0, 0, 0)


def test_stored_paths_are_paths_again():
    for path in ("a b/c.jpg", "猫.jpg", "100%.jpg", os.fsdecode(b"caf\xe9/%41.jpg")):
        assert path_of(stored_path(path)) == path
    assert photo_id("a" * 512) == "a" * 512
    assert photo_id("a" * 513) != photo_id("a" * 514)


def test_a_folder_without_readable_pictures_leaves_nothing(tmp_path):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "notes.txt").touch()
    for problem in ("holds no pictures", "none of the 1 pictures .* can be read; a.jpg: not a picture"):
        with pytest.raises(DataError, match=problem):
            index(tmp_path / "pics")
        assert not (tmp_path / "home" / "mmwudao" / "folders").exists() or not ls(tmp_path / "home")
        (tmp_path / "pics" / "a.jpg").write_bytes(b"no picture")
    own = tmp_path / "own"
    own.mkdir()
    with pytest.raises(DataError, match="none of the 1"):
        index(tmp_path / "pics", collection=own)
    assert not list(own.iterdir())


def ls(folder: Path) -> list[Path]:
    return list((folder / "mmwudao" / "folders").iterdir())


def test_an_emptied_folder_drops_nothing(folder):
    """It may be a disk that is not mounted."""
    index(folder)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="no folder"):
        index(folder)
    folder.mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        index(folder)
    assert len(ids(folder)) == 3


def test_a_folder_that_cannot_be_listed_keeps_its_pictures(folder, monkeypatch):
    save_colour(folder / "closed" / "a.png", "cyan")
    index(folder)
    listing = os.scandir

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr("data.photos.files.os.scandir", scandir)
    report = index(folder)
    assert (report.items, report.dropped, report.skipped) == (4, 0, {"folder not listed": 1})


def test_settings_are_kept_until_others_are_given(folder):
    assert index(folder, settings=PhotoSettings(["green*"])).items == 2
    assert index(folder).items == 2
    assert changes(index(folder, settings=PhotoSettings(["red*"]))) == (1, 0, 0, 1)
    place = read_place(default_place(folder))
    assert place is not None
    assert place.settings.exclude == ["red*"]


def test_a_read_only_folder_is_indexed(folder):
    folder.chmod(0o555)
    try:
        assert index(folder).items == 3
        assert sorted(path.name for path in folder.iterdir()) == ["blue.png", "green.png", "red.png"]
    finally:
        folder.chmod(0o755)


def test_places(folder, tmp_path):
    own = tmp_path / "own"
    assert index(folder, collection=own).items == 3
    with pytest.raises(CollectionError, match="have not been indexed: run `mmwudao index build"):
        find_place(folder)
    other = save_colour(tmp_path / "other" / "a.png", "red").parent
    with pytest.raises(CollectionError, match="holds the pictures of"):
        index(other, collection=own)
    assert index(other, collection=own, rebuild=True).items == 1
    # a folder that was moved is recognised by its contents
    moved = tmp_path / "moved"
    other.rename(moved)
    assert changes(index(moved, collection=own)) == (0, 0, 0, 0)
    place = read_place(own)
    assert place is not None
    assert place.folder == moved
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "a.txt").touch()
    with pytest.raises(CollectionError, match="holds other files"):
        index(folder, collection=tmp_path / "documents")
    assert [path.name for path in (tmp_path / "documents").iterdir()] == ["a.txt"]


def test_a_part_of_a_folder(folder):
    save_colour(folder / "sub" / "a.png", "red")
    save_colour(folder / "sub'-0" / "b.png", "red")
    index(folder)
    place = find_place(folder / "sub")
    assert place.below == "sub"
    query = ColourTowers().encode_text(["red"])[0].numpy()
    with open_collection(place.collection) as collection:
        assert [hit.id for hit in collection.search(query, 9, place.condition)] == ["sub/a.png"]
        other = find_place(folder / "sub'-0").condition
        assert [hit.id for hit in collection.search(query, 9, other)] == ["sub'-0/b.png"]


def test_other_towers_and_other_processes_are_named(folder):
    index(folder)
    save_colour(folder / "new.png", "cyan")

    class Others(ColourTowers):
        def __init__(self):
            super().__init__()
            self.project.weight.data.neg_()

    with pytest.raises(CollectionError, match="other towers"):
        index_photos(Others, PhotoRequest(folder, workers=1))
    assert index_photos(Others, PhotoRequest(folder, workers=1, rebuild=True)).added == 4
    with (
        indexing.FileLock(default_place(folder) / indexing.OWN_FOLDER / indexing.LOCK),
        pytest.raises(CollectionError, match="another process"),
    ):
        index(folder)


def test_an_interrupted_run_keeps_what_it_has_done(folder, monkeypatch):
    for k, name in enumerate(COLOURS):
        save_colour(folder / f"more-{k}.png", name, (10 + k, 10))
    monkeypatch.setattr(indexing, "BATCH", 2)
    taken: list[str] = []
    take = indexing._Update._take

    def interrupted(self, task, result):
        if len(taken) == 5:
            raise KeyboardInterrupt
        taken.append(task.id)
        take(self, task, result)

    monkeypatch.setattr(indexing._Update, "_take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index(folder)
    assert ids(folder) == sorted(taken)
    monkeypatch.setattr(indexing._Update, "_take", take)
    report = index(folder)
    assert (report.items, report.added) == (11, 6)


KILLED = """
import sys, time
from pathlib import Path
from retrieval.photos import indexing
from tests.helpers.colour_towers import ColourTowers

def main():
    indexing.BATCH, indexing.STORE_ROWS = 1, 2
    encode, done = ColourTowers.encode_pixels, []

    def slow(self, pixels):
        done.append(pixels)
        if len(done) > 10:
            time.sleep(600)  # until it is killed
        return encode(self, pixels)

    ColourTowers.encode_pixels = slow
    indexing.index_photos(ColourTowers, indexing.PhotoRequest(Path(sys.argv[1]), workers=1))

if __name__ == "__main__":
    main()
"""


def test_a_killed_run_is_continued(folder, tmp_path):
    for k in range(20):
        save_colour(folder / f"more-{k:02}.png", list(COLOURS)[k % 8], (10 + k, 10))
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, script, folder], env=environment)
    stored = 0
    deadline = time.monotonic() + 300
    while stored < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
        if (default_place(folder) / "items.lance" / "_versions").is_dir():
            with open_collection(default_place(folder)) as collection:
                stored = collection.count()
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(ids(folder))
    assert 2 <= kept <= 10
    report = index(folder)
    assert (report.items, report.added) == (23, 23 - kept)
    assert not list(orphans(script))


def orphans(script: Path) -> Iterator[int]:
    """Processes that decode for a parent that was killed; they end by themselves."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/environ")
            if _holds(path, os.fsencode(str(script.parent / "home")))
            and _holds(path.with_name("cmdline"), b"multiprocessing")
            and _parent(path.with_name("stat")) == 1
        ]
        if not found:
            return
        time.sleep(0.1)
    yield from found


def _holds(path: Path, text: bytes) -> bool:
    try:
        return text in path.read_bytes()
    except OSError:  # it has ended, or belongs to somebody else
        return False


def _parent(path: Path) -> int:
    try:
        return int(path.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
