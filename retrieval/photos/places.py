"""Where the collection of a folder of pictures is, what it records of the folder, and where its pictures lie.

The collection of a folder is in the user's data folder, so that nothing is written among the pictures. In it,
`.photos/` holds `folder.json` (which folder, with which settings) and `skipped.log`. An item is a picture: `path` is
its path below the folder, `size` and `changed` are the file's, `content` names its bytes, `taken` is its time by EXIF.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

from data.atomic import write_file
from data.config import ConfigError, from_dict
from data.photos.files import PhotoSettings
from data.records import parse_json
from retrieval.collections.base import MAX_ID, CollectionError, Hit
from retrieval.collections.where import sql_text

FORMAT = "mmwudao-photos/1"
OWN_FOLDER = ".photos"  # in a collection
RECORD, LOG, LOCK = "folder.json", "skipped.log", "lock"
ESCAPED = "bytes:"  # begins the stored path of a file whose name is not UTF-8
TABLE_FOLDER = "items.lance"  # of every collection in a folder


@dataclass(frozen=True)
class PhotoPlace:
    """The collection of a folder of pictures; `below` is the part of the folder that is meant, "" for all of it."""

    collection: Path
    folder: Path
    settings: PhotoSettings
    model: str  # how the user called the towers
    below: str = ""
    by: str = "towers"  # which part of the model made the vectors

    @property
    def log(self) -> Path:
        return self.collection / OWN_FOLDER / LOG

    @property
    def condition(self) -> str | None:
        """The `where` expression of what is in the part that is meant."""
        if not self.below:
            return None
        # "0" is the character after "/"
        return f"path >= {sql_text(self.below + '/')} AND path < {sql_text(self.below + '0')}"

    def photo(self, hit: Hit) -> Path:
        """The file of an item. Raises `CollectionError` for an item that is no picture of the folder."""
        path = path_of(str(hit.metadata.get("path", "")))
        # whoever may write into the collection does not choose what is read outside of the folder
        if not path or Path(path).is_absolute() or ".." in Path(path).parts:
            raise CollectionError(f"{hit.id} is no file of {self.folder}")
        return self.folder / path


def default_place(folder: Path) -> Path:
    """Where the collection of `folder` is kept unless the user says where: in `mmwudao/folders` of the data folder.

    That is `~/.local/share` ($XDG_DATA_HOME) on Linux, `~/Library/Application Support` on macOS, and %LOCALAPPDATA%.
    """
    from platformdirs import user_data_path

    folder = folder.expanduser().resolve()
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in folder.name)[:40].strip("-")
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    return user_data_path("mmwudao", appauthor=False) / "folders" / f"{name or 'folder'}-{digest}"


def read_place(collection: Path | str) -> PhotoPlace | None:
    """The record in a collection, or None if it is no collection of a folder's pictures. Raises `CollectionError`."""
    path = Path(collection) / OWN_FOLDER / RECORD
    try:
        record = parse_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise CollectionError(f"{path} is damaged: build the collection anew with --rebuild") from error
    try:
        if record["format"] != FORMAT:
            raise CollectionError(f"{path} is of the format {record['format']!r}, not {FORMAT!r}: use --rebuild")
        settings = from_dict(PhotoSettings, record["settings"])
        folder, by = Path(path_of(record["folder"])), str(record.get("by", "towers"))
        return PhotoPlace(Path(collection), folder, settings, str(record["model"]), by=by)
    except (KeyError, TypeError, ConfigError) as error:
        raise CollectionError(f"{path} is damaged: build the collection anew with --rebuild") from error


def write_place(place: PhotoPlace) -> None:
    """Write the record into the collection."""
    record = {
        "format": FORMAT,
        "folder": stored_path(str(place.folder)),
        "model": place.model,
        "by": place.by,
        "settings": asdict(place.settings),
    }
    (place.collection / OWN_FOLDER).mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
    write_file(place.collection / OWN_FOLDER / RECORD, text.encode())


def find_place(folder: Path) -> PhotoPlace:
    """The default collection of `folder`, or of a folder above it. Raises `CollectionError` if there is none."""
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise CollectionError(f"no folder at {folder}")
    for above in (folder, *folder.parents):
        place = read_place(default_place(above))
        if place is not None:
            below = folder.relative_to(above).as_posix() if folder != above else ""
            return replace(place, below=below)
    raise CollectionError(f"the pictures in {folder} have not been indexed: run `mmwudao index build {folder}`")


def is_collection(location: str) -> bool:
    """Whether `location` names a collection: a bucket, a server, or a folder that holds one."""
    return "://" in location or (Path(location) / TABLE_FOLDER).is_dir()


def stored_path(path: str) -> str:
    """A path as metadata: itself, or, if its name is not UTF-8, its bytes in the manner of URLs."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return ESCAPED + quote_from_bytes(os.fsencode(path))
    return path


def path_of(stored: str) -> str:
    """The path that `stored_path` stored."""
    return os.fsdecode(unquote_to_bytes(stored.removeprefix(ESCAPED))) if stored.startswith(ESCAPED) else stored


def photo_id(stored: str) -> str:
    """The id of the picture with this stored path: the path, or its beginning and its hash if it is too long."""
    if len(stored) <= MAX_ID:
        return stored
    digest = hashlib.sha256(stored.encode()).hexdigest()[:32]
    return f"{stored[: MAX_ID - len(digest) - 1]}#{digest}"
