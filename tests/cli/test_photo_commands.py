"""A folder of pictures from the command line: `index build FOLDER` and `search`."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from PIL import Image

from mmwudao.cli.app import run
from mmwudao.sheets import SheetEntry, html_sheet
from retrieval.photos.indexing import PhotoRequest, index_photos
from retrieval.photos.places import default_place
from tests.helpers.cli import one_error
from tests.helpers.colour_towers import COLOURS, ColourTowers
from tests.helpers.photos import colour_at, exif_bytes, save_colour
from tests.helpers.tiny_towers import write_shards

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder of pictures that is indexed, and the data folder with its collection. Tests must not change them."""
    folder, home = tmp_path_factory.mktemp("pics"), tmp_path_factory.mktemp("home")
    for name in COLOURS:
        save_colour(folder / ("sub dir" if name < "g" else ".") / f"{name}.png", name)
    taken = exif_bytes(1, "2019:07:04 12:30:00")
    save_colour(folder / "old red.jpg", "red", exif=taken, quality=95)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(home))
        index_photos(ColourTowers, PhotoRequest(folder, model="emoji", workers=1))
    return folder, home


@pytest.fixture
def folder(built, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(built[1]))
    monkeypatch.setattr("mmwudao.loading.towers.load_model_towers", lambda *_: ColourTowers())
    monkeypatch.chdir(built[0])
    return built[0]


def found(capsys, *words) -> list[str]:
    assert run(["search", *words, "--paths"]) == 0
    return [Path(line).name for line in capsys.readouterr().out.splitlines()]


def test_a_folder_is_built_and_searched(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("mmwudao.loading.towers.load_model_towers", lambda *_: ColourTowers())
    pics = tmp_path / "pics"
    for name in ("red", "green"):
        save_colour(pics / f"{name}.png", name)
    (pics / "bad.gif").write_bytes(b"GIF no more")
    assert run(["index", "build", str(pics), "--exclude", "green*"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        f"1 pictures of {pics}: 1 added",
        f"left out: 1 corrupt image; named in {default_place(pics)}/.photos/skipped.log",
        str(default_place(pics)),
    ]
    save_colour(pics / "blue.png", "blue")
    assert run(["index", "build", str(pics), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["items"], record["added"], record["skipped"]) == (2, 1, {"corrupt image": 1})
    save_colour(pics / "cyan.png", "cyan")
    assert run(["search", "cyan", "--in", str(pics), "--update", "-k", "1"]) == 0
    assert capsys.readouterr().out == f"1.0000  {pics / 'cyan.png'}\n"


def test_texts_and_pictures_are_added_and_subtracted(folder, capsys):
    assert found(capsys, "red", "--top", "2") == ["red.png", "old red.jpg"]
    assert found(capsys, "red", "+", "green", "-", "blue", "-k", "1") == ["yellow.png"]
    assert found(capsys, "white", "-", "2*red", "-k", "1") == ["cyan.png"]
    assert found(capsys, "2*blue", "+", "./red.png", "-k", "1") == ["blue.png"]
    # a picture that is searched for is left out
    assert found(capsys, "./red.png", "-k", "1") == ["old red.jpg"]
    assert found(capsys, "-", "blue", "+", "green", "--image", "red.png", "-k", "1") == ["yellow.png"]


def test_parts_conditions_and_other_places(folder, capsys, monkeypatch):
    assert sorted(found(capsys, "red", "--in", "sub dir")) == ["black.png", "blue.png", "cyan.png"]
    assert found(capsys, "blue", "--where", "taken > '2019' AND taken < '2020'") == ["old red.jpg"]
    monkeypatch.chdir(folder.parent)
    place = str(default_place(folder))
    for words in (["--collection", place, "magenta"], [place, "magenta"]):
        assert found(capsys, *words, "-k", "1") == ["magenta.png"]
    assert run(["search", place, "magenta", "-k", "1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["id"], record["file"]) == ("magenta.png", str(folder / "magenta.png"))


def test_paths_end_with_nul_if_asked(folder, capfdbinary):
    assert run(["search", "red", "-k", "2", "--paths", "-0"]) == 0
    out = capfdbinary.readouterr().out
    assert out.split(b"\0") == [os.fsencode(folder / "red.png"), os.fsencode(folder / "old red.jpg"), b""]


def test_sheets_are_written_and_opened(folder, tmp_path, capsys, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr("typer.launch", opened.append)
    assert run(["search", "red", "-k", "2", "--sheet", str(tmp_path / "s.png")]) == 0
    with Image.open(tmp_path / "s.png") as sheet:
        assert colour_at(sheet.convert("RGB"), (60, 60))[0] > 240
    assert run(["search", "red", "-k", "2", "--sheet", str(tmp_path / "s.html"), "--open"]) == 0
    page = (tmp_path / "s.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2
    assert f'href="{(folder / "old red.jpg").as_uri()}"' in page
    assert opened == [str(tmp_path / "s.html")]
    assert run(["search", "red", "--open"]) == 0
    assert Path(opened[1]).read_text().startswith("<!doctype html>")
    Path(opened[1]).unlink()
    Path(opened[1]).parent.rmdir()


def test_a_sheet_escapes_what_it_shows():
    entry = SheetEntry(Image.new("RGB", (4, 4)), "<b>.jpg", 'file:///a"b')
    page = html_sheet("<script>", [entry]).decode()
    assert "<script>" not in page
    assert "&lt;b&gt;.jpg" in page
    assert 'href="file:///a&quot;b"' in page


def test_one_line_for_whatever_is_wrong(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    write_shards(tmp_path / "shards", ("a",))
    cases = [
        (["index", "build", str(tmp_path / "empty")], "holds no pictures"),
        (["index", "build", str(tmp_path / "none")], "no folder of pictures or shards at"),
        (["index", "build", str(folder), "--kind", "text"], "--kind is image"),
        (["index", "build", str(folder), "--collection", "s3://bucket/a"], "on this machine"),
        (["index", "build", str(tmp_path / "shards")], "say where to build it"),
        (["search"], "give a text or --image"),
        (["search", "red", "-"], "missing after the -"),
        (["search", "red", "blue"], "no collection at red"),
        (["search", "red", "--in", str(tmp_path / "empty")], "have not been indexed: run `mmwudao index build"),
        (["search", "red", "--in", str(tmp_path / "none")], "no folder at"),
        (["search", "red", "--in", ".", "--collection", "c"], "not both"),
        (["search", "red", "--paths", "--json"], "give one of"),
        (["search", "red", "-0"], "--null is for --paths"),
        (["search", "red", "--preview"], "needs a terminal"),
        (["search", "red", "-", "red"], "cancel out"),
        (["search", str(tmp_path / "bad.jpg")], "bad.jpg: not a picture"),
        (["search", "./none.jpg"], "no picture at none.jpg"),
    ]
    for command, problem in cases:
        assert run(command) == 2, command
        assert problem in one_error(capsys), command
    assert not list((tmp_path / "empty").iterdir())


def test_shards_stay_shards(tmp_path, folder, capsys):
    write_shards(tmp_path / "shards", ("a",))
    save_colour(tmp_path / "shards" / "beside.png", "red")
    assert run(["index", "build", str(tmp_path / "shards"), "--collection", str(tmp_path / "c")]) == 0
    assert capsys.readouterr().out.startswith("8 items")
    assert run(["search", str(tmp_path / "c"), "red", "+", "green", "-", "blue", "-k", "1"]) == 0
    assert "a-yellow" in capsys.readouterr().out
    assert run(["search", str(tmp_path / "c"), "red", "--paths"]) == 2
    assert "a sample of a shard" in capsys.readouterr().err


TERMINAL = """
from PIL import Image
from mmwudao.cli.preview import show_thumbnails
show_thumbnails([Image.new("RGB", (40, 20), "red"), None], ["0.5 猫.jpg", "gone.jpg"])
"""


@pytest.mark.parametrize(("features", "shown"), [(b"\x1b[?62;4c", b"\x1bP"), (b"\x1b[?62c", "▀".encode())])
def test_thumbnails_are_what_the_terminal_can_show(features, shown):
    """Sixel graphics for a terminal that says that it has them, else half blocks."""
    terminal, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 800, 480))  # rows, columns, pixels
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "80"}
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL], stdin=inner, stdout=inner, env=environment, start_new_session=True
    )
    os.close(inner)
    seen = bytearray()

    def answer() -> None:
        asked = False
        while True:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # the other side is closed
                return
            if not part:
                return
            seen.extend(part)
            if b"\x1b[c" in seen and not asked:
                asked = True
                os.write(terminal, features)

    reader = threading.Thread(target=answer)
    reader.start()
    assert process.wait(timeout=120) == 0
    reader.join(timeout=120)
    os.close(terminal)
    assert "猫.jpg".encode() in seen
    assert b"gone.jpg" in seen
    assert shown in seen
