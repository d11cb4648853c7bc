"""Which files of a folder are pictures, and how each is read."""

from __future__ import annotations

import os
from typing import cast

import pytest
from PIL import Image

from data.images import CorruptImage, ImageTooLarge
from data.photos import reading
from data.photos.decoding import (
    CORRUPT,
    CRASHED,
    NOT_READ,
    DecodedPhoto,
    PhotoDecoder,
    PhotoJob,
    UnreadablePhoto,
    decode_photo,
)
from data.photos.files import PhotoSettings, find_photos
from data.photos.reading import MissingReader, open_photo, read_photo
from data.sample import DataError
from tests.helpers.deadly import Deadly
from tests.helpers.photos import colour_at, dng, exif_bytes, save_colour


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def found(folder, **settings):
    return [photo.path for photo in find_photos(folder, PhotoSettings(**settings)).photos]


def test_pictures_of_every_suffix_and_script_are_found(tmp_path):
    names = ["a.JPG", "b.Jpeg", "c.jfif", "d.png", "e.HEIC", "f.avif", "g.CR2", "h.webp", "子猫.jpg", "Été/été.TIFF"]
    touch(tmp_path, *names, "film.mp4", "notes.txt", "jpg", "a.jpg.part")
    assert found(tmp_path) == sorted(names)


def test_hidden_and_thumbnail_folders_are_left_out(tmp_path):
    left_out = [
        ".thumbnails/a.jpg", "@eaDir/b.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/a.jpg", ".Trash-1000/files/a.jpg",
        "x/node_modules/a.png", "Thumbs/a.jpg", "$RECYCLE.BIN/a.jpg", "Lightroom Previews.lrdata/a.jpg",
        "P.photoslibrary/resources/derivatives/a.jpg", "lost+found/a.jpg",
    ]  # fmt: skip
    touch(tmp_path, *left_out, ".hidden/a.jpg", "._a.jpg", "resources/a.jpg", "P.photoslibrary/originals/a.jpg")
    assert found(tmp_path) == ["P.photoslibrary/originals/a.jpg", "resources/a.jpg"]
    shown = found(tmp_path, hidden=True)
    assert {".hidden/a.jpg", "._a.jpg"} <= set(shown)
    assert not set(left_out) & set(shown)


def test_exclusions_name_files_folders_and_paths(tmp_path):
    touch(tmp_path, "a.jpg", "a.gif", "work/a.jpg", "home/work/b.jpg", "home/drafts/c.jpg", "drafts/d.jpg")
    assert found(tmp_path, exclude=["*.gif", "work", "home/drafts/"]) == ["a.jpg", "drafts/d.jpg"]


def test_links_are_followed_once_and_loops_end(tmp_path):
    folder, outside = tmp_path / "in", tmp_path / "out"
    touch(folder, "a.jpg", "sub/b.jpg")
    touch(outside, "c.jpg")
    (folder / "AA-loop").symlink_to(folder)
    (folder / "sub" / "up").symlink_to(tmp_path)  # and in it `in` and `out` again
    (folder / "AA-a.jpg").symlink_to(folder / "a.jpg")
    (folder / "far").symlink_to(outside)
    (folder / "broken.jpg").symlink_to(folder / "none.jpg")
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    assert found(folder) == ["a.jpg", "far/c.jpg", "sub/b.jpg"]


def test_a_raw_file_beside_its_picture_is_left_out(tmp_path):
    touch(tmp_path, "IMG_1.CR2", "img_1.jpg", "IMG_2.CR2", "sub/IMG_1.cr2")
    assert found(tmp_path) == ["IMG_2.CR2", "img_1.jpg", "sub/IMG_1.cr2"]


def test_a_pipe_is_no_picture_and_a_closed_folder_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    touch(tmp_path, "a.jpg", "closed/b.jpg")
    (tmp_path / "closed").chmod(0)
    result = find_photos(tmp_path, PhotoSettings())
    (tmp_path / "closed").chmod(0o755)
    if os.geteuid():  # root may list every folder
        assert [photo.path for photo in result.photos] == ["a.jpg"]
        assert result.unlisted == {"closed": "Permission denied"}
    for place in (tmp_path / "none", tmp_path / "a.jpg"):
        with pytest.raises(DataError, match="folder"):
            find_photos(place, PhotoSettings())


@pytest.fixture
def heic():
    """Pillow can write HEIC inside a test that asks for it, whichever process the other tests run in."""
    from pillow_heif import register_heif_opener

    register_heif_opener()


@pytest.mark.usefixtures("heic")
@pytest.mark.parametrize("name", ["a.heic", "a.avif", "a.webp", "a.tiff", "a.bmp", "a.gif", "a.jfif", "wrong.jpg"])
def test_formats_are_read_by_their_content(name, tmp_path):
    path = save_colour(tmp_path / name.replace("wrong.jpg", "wrong.png"), "red")
    path = path.rename(tmp_path / name)
    image = open_photo(path)
    assert (image.mode, image.size) == ("RGB", (24, 16))
    red, green, blue = colour_at(image, (5, 5))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.usefixtures("heic")
@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".heic"])
def test_pictures_are_turned_upright_and_dated(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    stored = Image.new("RGB", (64, 32), "red")
    stored.paste((0, 0, 255), (0, 0, 64, 8))  # the top of what is stored is the right of what is seen
    stored.save(path, exif=exif_bytes(6, "2019:07:04 12:30:00"))
    image = open_photo(path)
    assert image.size == (32, 64)
    assert colour_at(image, (30, 5))[2] > 200
    assert colour_at(image, (2, 5))[0] > 200
    assert image.info["taken"] == "2019-07-04T12:30:00"


def test_damaged_dates_do_not_matter(tmp_path):
    path = save_colour(tmp_path / "a.jpg", "red", exif=exif_bytes(1, "0000:00:00 00:00:00"))
    assert "taken" not in open_photo(path).info


@pytest.mark.parametrize(
    ("orientation", "size", "blue"),
    [(1, (80, 48), (40, 2)), (6, (48, 80), (45, 40)), (3, (80, 48), (40, 45)), (8, (48, 80), (2, 40))],
)
def test_the_preview_of_a_raw_file_is_read(orientation, size, blue):
    preview = Image.new("RGB", (80, 48), "red")
    preview.paste((0, 0, 255), (0, 0, 80, 8))
    image = read_photo(dng(preview, orientation), ".DNG")
    assert image.size == size
    assert colour_at(image, blue)[2] > 200
    assert colour_at(image, (size[0] // 2, size[1] // 2))[0] > 200


def test_a_raw_file_without_preview_is_corrupt():
    with pytest.raises(CorruptImage, match="RAW"):
        read_photo(b"no raw file at all" * 100, ".nef")


@pytest.mark.parametrize(("module", "name"), [("rawpy", "a.dng"), ("pillow_heif", "a.heic")])
def test_a_missing_library_is_named_with_its_extra(module, name, tmp_path, monkeypatch):
    content = dng(Image.new("RGB", (8, 8))) if name == "a.dng" else b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    (tmp_path / name).write_bytes(content)
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingReader, match=rf"{module}.*mmwudao\[photos\]"):
        open_photo(tmp_path / name)


def test_a_job_says_what_is_wrong_with_a_file(tmp_path, monkeypatch):
    touch(tmp_path, "bad.jpg")
    (tmp_path / "empty.jpg").touch()
    good = save_colour(tmp_path / "good.jpg", "red", (900, 600))
    bad, empty = (decode_photo(PhotoJob(str(tmp_path / f"{name}.jpg"), 32)) for name in ("bad", "empty"))
    assert isinstance(bad, UnreadablePhoto)
    assert bad.reason == CORRUPT
    assert isinstance(empty, UnreadablePhoto)
    assert "empty" in empty.problem
    assert decode_photo(PhotoJob(str(tmp_path / "none.jpg"), 32)) == UnreadablePhoto(
        NOT_READ, "No such file or directory"
    )
    decoded = decode_photo(PhotoJob(str(good), 32))
    assert isinstance(decoded, DecodedPhoto)
    assert decoded.pixels is not None
    assert decoded.pixels.shape == (64, 96, 3)
    again = decode_photo(PhotoJob(str(good), 32, frozenset([decoded.content])))
    assert again == DecodedPhoto(decoded.content, None)
    monkeypatch.setattr(reading, "MAX_PHOTO_PIXELS", 1000)
    with pytest.raises(ImageTooLarge, match="the cap is 1000"):
        open_photo(good)


def test_a_picture_that_crashes_its_process_is_unreadable_and_no_more(tmp_path, monkeypatch):
    jobs = [PhotoJob(str(save_colour(tmp_path / f"{name}.png", name)), 8) for name in ("red", "blue", "green")]
    # no file is known to crash a decoder: this one ends its process when it is read
    jobs.insert(1, PhotoJob(cast(str, Deadly()), 8))
    with PhotoDecoder(1) as decoder:
        results = decoder.collect(jobs, decoder.submit(jobs))
    assert [isinstance(one, DecodedPhoto) for one in results] == [True, False, True, True]
    crashed = results[1]
    assert isinstance(crashed, UnreadablePhoto)
    assert crashed.reason == CRASHED
