"""Which files of a folder are pictures of its owner: suffixes, folders that are left out, links, exclusions."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from data.options import option
from data.sample import DataError

STANDARD_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .webp .gif .bmp .tif .tiff .avif .heic .heif .hif".split()
)
RAW_SUFFIXES = frozenset(
    (
        ".3fr .arw .cr2 .cr3 .crw .dng .erf .iiq .kdc .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2 .srf .srw .x3f"
    ).split()
)
# Left out whatever the settings say: caches of thumbnails, bins, other programs' files. A pattern with a slash is
# compared with the name and that of the folder above; case does not matter.
LEFT_OUT = (
    ".thumbnails", "thumbnails", "thumbs", ".@__thumb", "@eadir", "*.lrdata", ".dtrash",
    "*.photoslibrary/resources", "*.photoslibrary/database", "*.photoslibrary/private", "*.photoslibrary/scopes",
    ".trash*", "$recycle.bin", "#recycle", "@recycle", "#snapshot", "@recently-snapshot", "lost+found",
    "__macosx", "system volume information", "node_modules", "__pycache__", ".git",
)  # fmt: skip


@dataclass(frozen=True)
class PhotoSettings:
    """Which pictures of a folder are left out, besides what is in the folders of `LEFT_OUT`."""

    exclude: list[str] = option(
        [], "Leave out files and folders whose name, or path below FOLDER, matches this pattern; may be repeated."
    )
    hidden: bool = option(False, "Also take files and folders whose names begin with a dot.")


@dataclass(frozen=True)
class PhotoFile:
    """A picture file: its path below the folder with `/` between the names, bytes, and time of change in ns."""

    path: str
    size: int
    changed: int


@dataclass
class FoundPhotos:
    """The pictures of a folder in the order of their paths, and the folders below it that could not be listed."""

    photos: list[PhotoFile] = field(default_factory=list)
    unlisted: dict[str, str] = field(default_factory=dict)  # path below the folder -> problem


def find_photos(folder: Path, settings: PhotoSettings) -> FoundPhotos:
    """All pictures in `folder` and below it.

    Links are followed, but to no folder or file that was taken already, so that loops end. A RAW file beside a picture
    of the same name but for the suffix is left out: that picture was made from it.
    Raises `DataError` if `folder` is none or cannot be listed.
    """
    if not folder.is_dir():
        raise DataError(f"no folder at {folder}" if not folder.exists() else f"{folder} is no folder")
    walk = _Walk(folder, settings)
    walk.follow(folder, "")
    while walk.links:  # after everything that lies in the folder itself, whose paths are to be preferred
        walk.follow_link(*walk.links.pop(0))
    if "" in walk.found.unlisted:
        raise DataError(f"{folder} cannot be listed: {walk.found.unlisted['']}")
    walk.found.photos = sorted(_without_developed(walk.found.photos), key=lambda photo: photo.path)
    return walk.found


class _Walk:
    def __init__(self, folder: Path, settings: PhotoSettings) -> None:
        self.folder, self.settings = folder, settings
        self.found = FoundPhotos()
        self.links: list[tuple[Path, str]] = []
        self._seen: set[tuple[int, int]] = set()  # device and inode of folders and files

    def follow(self, start: Path, below: str, linked: bool = False) -> None:
        """Take what is in the folder `start`, whose path below the outermost one is `below`."""
        folders = [(start, below)]
        while folders:
            folder, path = folders.pop()
            try:
                # without links a folder is met once; and some file systems give several folders one inode
                if not self._is_new(os.stat(folder)) and linked:
                    continue
                with os.scandir(folder) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
            except OSError as error:
                self.found.unlisted[path] = error.strerror or str(error)
                continue
            for entry in entries:
                name = f"{path}/{entry.name}" if path else entry.name
                if self._is_left_out(name):
                    continue
                if entry.is_symlink():
                    self.links.append((Path(entry.path), name))
                elif entry.is_dir(follow_symlinks=False):
                    folders.append((Path(entry.path), name))
                else:
                    self._take(Path(entry.path), name, linked)

    def follow_link(self, link: Path, path: str) -> None:
        if link.is_dir():
            self.follow(link, path, linked=True)
        else:
            self._take(link, path, linked=True)

    def _take(self, file: Path, path: str, linked: bool) -> None:
        if not _has_photo_suffix(path):
            return
        try:
            status = os.stat(file)
        except OSError:  # it has gone in the meantime, or is a link to nowhere
            return
        if stat.S_ISREG(status.st_mode) and (self._is_new(status) or not linked):
            self.found.photos.append(PhotoFile(path, status.st_size, status.st_mtime_ns))

    def _is_new(self, status: os.stat_result) -> bool:
        key = status.st_dev, status.st_ino
        if key in self._seen:
            return False
        self._seen.add(key)
        return True

    def _is_left_out(self, path: str) -> bool:
        names = path.split("/")
        name, place = names[-1].lower(), "/".join(names[-2:]).lower()
        if name.startswith(".") and not self.settings.hidden:
            return True
        if any(fnmatchcase(place if "/" in pattern else name, pattern) for pattern in LEFT_OUT):
            return True
        patterns = [pattern.strip("/") for pattern in self.settings.exclude]
        return any(fnmatchcase(names[-1], pattern) or fnmatchcase(path, pattern) for pattern in patterns)


def _has_photo_suffix(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    return suffix in STANDARD_SUFFIXES or suffix in RAW_SUFFIXES


def _without_developed(photos: list[PhotoFile]) -> Iterator[PhotoFile]:
    """The pictures but those RAW files that lie beside a picture of the same name."""
    split = [os.path.splitext(photo.path) for photo in photos]
    developed = {stem.lower() for stem, suffix in split if suffix.lower() not in RAW_SUFFIXES}
    for photo, (stem, suffix) in zip(photos, split, strict=True):
        if suffix.lower() not in RAW_SUFFIXES or stem.lower() not in developed:
            yield photo
