"""Your own pictures and captions to shards: a folder of images with `.txt` or `.json` beside them, or a table of paths.

A table is CSV, TSV or JSONL with the columns path (or image, filepath) and caption (or text, title), and if you like
id, language, family, licence and source.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from data.atomic import check_unused, new_folder
from data.images import MAX_PIXELS, ImageTooLarge, open_image, read_header, to_square
from data.options import check_options, option
from data.reading import CORRUPT_IMAGE, MISSING_CAPTION, MISSING_PICTURE, TOO_LARGE, SkipLog
from data.sample import IMAGE_EXTENSIONS, UNKNOWN_LANGUAGE, DataError, Sample
from data.shards import Manifest, ShardInfo, ShardWriter, write_manifest

PICTURE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
PATH_COLUMNS = ("path", "image", "filepath")
CAPTION_COLUMNS = ("caption", "text", "title")
LANGUAGE_TAG = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*")
MAX_ID_BYTES = 90  # a tar header holds 100 bytes of name, extension included


@dataclass(frozen=True)
class Entry:
    """A picture to pack. `name` is what the user calls it, `record` its JSON, `text` its plain caption file."""

    id: str
    path: Path
    name: str
    record: dict[str, Any]
    text: Path | None = None
    json: Path | None = None


class _Skip(DataError):
    """A sample that cannot be packed, and the reason it is counted under."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


@dataclass(frozen=True)
class PackSettings:
    """How to pack. Raises `DataError` for a value out of range."""

    image_size: int | None = option(
        None, "Resize the shorter side to this many pixels and crop the centre; default: keep the size.",
        least=8, most=4096,
    )  # fmt: skip
    language: str = option(UNKNOWN_LANGUAGE, "The language of captions that name none: zh, en, ...; und: unknown.")
    samples_per_shard: int = option(2000, "Put at most this many samples into one tar file.", least=1)
    max_pixels: int = option(MAX_PIXELS, "Skip pictures of more pixels than this.", least=1)
    test_fraction: float = option(0.0, "Put this share of the samples into a test split.", least=0, most=1)
    strict: bool = option(False, "Stop at the first bad sample instead of skipping it.")

    def __post_init__(self) -> None:
        try:
            check_options(self)
        except ValueError as error:
            raise DataError(str(error)) from error
        if self.test_fraction == 1:
            raise DataError("test_fraction must be below 1: nothing would be left to train on")
        if not LANGUAGE_TAG.fullmatch(self.language):
            raise DataError(f"{self.language!r} is no language code such as zh, en or und")


def pack_samples(
    source: Path | str, out: Path | str, settings: PackSettings | None = None, progress: bool = True
) -> Manifest:
    """Pack the pictures of `source` (a folder or a table) into the new folder `out`; the same input, the same bytes.

    With an `image_size` each picture is stored as a square of lossless WebP; without, PNG, WebP and JPEG files are
    stored as they are and others as PNG. The test split is chosen by a hash of the pictures' bytes, so equal pictures
    stay together. What cannot be packed is counted in the manifest and named in `skipped.log`.

    Raises `DataError` for an `out` that is not empty, two samples of one id, or nothing to pack; `out` then stays as
    it was.
    """
    source, out, settings = Path(source), Path(out), settings or PackSettings()
    check_unused(out)
    entries = _unique(_entries(source))
    try:
        with new_folder(out) as building:
            log = SkipLog(building / "skipped.log")
            splits = _write_shards(building, tqdm(entries, "packing", disable=not progress), settings, log)
            if not any(splits.values()):
                reasons = ", ".join(f"{reason}: {count}" for reason, count in log.counts.items())
                raise DataError(f"nothing to pack in {source} ({reasons})")
            recipe = {"language": settings.language, "test_fraction": settings.test_fraction}
            manifest = Manifest(
                name=source.resolve().stem,
                image_size=settings.image_size,
                splits=splits,
                sources={"pack": {"source": source.resolve().name, **recipe}},
                skipped=log.counts,
            )
            write_manifest(building, manifest)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}") from error
    return manifest


def _write_shards(
    folder: Path, entries: Iterable[Entry], settings: PackSettings, log: SkipLog
) -> dict[str, list[ShardInfo]]:
    """Write the shards of each split into `folder`."""
    names = ("train", "test") if settings.test_fraction else ("train",)
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(ShardWriter(folder, name, settings.samples_per_shard)) for name in names
        }
        for entry in entries:
            try:
                content = _read(entry)
                sample = _sample(entry, content, settings)
            except _Skip as skip:
                if settings.strict:
                    raise DataError(f"{entry.name}: {skip}") from skip
                log.add(skip.reason, entry.name, str(skip))
                continue
            writers["test" if _fraction(content) < settings.test_fraction else "train"].write(sample)
    return {name: writer.shards for name, writer in writers.items()}


def _entries(source: Path) -> list[Entry]:
    if source.is_dir():
        return _folder_entries(source)
    if not source.is_file():
        raise DataError(f"no folder or file at {source}")
    if source.suffix.lower() not in TABLE_SUFFIXES:
        raise DataError(f"{source} is no folder, and no {', '.join(TABLE_SUFFIXES)} table of paths and captions")
    return _table_entries(source)


def _folder_entries(folder: Path) -> list[Entry]:
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    entries = []
    for path in sorted(paths):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue  # thumbnails and resource forks, which file managers leave
        text, record = path.with_suffix(".txt"), path.with_suffix(".json")
        entries.append(
            Entry(
                id=sample_id(name.with_suffix("").as_posix()),
                path=path,
                name=name.as_posix(),
                record={},
                text=text if text.is_file() else None,
                json=record if record.is_file() else None,
            )
        )
    if not entries:
        raise DataError(f"{folder} holds no picture ({', '.join(PICTURE_SUFFIXES)})")
    return entries


def _table_entries(table: Path) -> list[Entry]:
    entries = []
    for line, row in _rows(table):
        path = next((row[column] for column in PATH_COLUMNS if row.get(column)), None)
        if not isinstance(path, str):
            raise DataError(f"{table} line {line}: no path (columns read: {', '.join(PATH_COLUMNS)})")
        caption = next((row[column] for column in CAPTION_COLUMNS if row.get(column)), None)
        language = row.get("language")
        if language and not LANGUAGE_TAG.fullmatch(str(language)):
            raise DataError(f"{table} line {line}: {language!r} is no language code such as zh, en or und")
        record = {key: row[key] for key in ("captions", "family", "licence", "source") if row.get(key)}
        if "captions" not in record and caption:
            record["captions"] = {str(language or UNKNOWN_LANGUAGE): str(caption)}
        given = row.get("id")
        entries.append(
            Entry(
                id=sample_id(str(given) if given else os.path.splitext(path.replace("\\", "/"))[0]),
                path=table.parent / path,
                name=f"{path} (line {line})",
                record=record,
            )
        )
    if not entries:
        raise DataError(f"{table} holds no row")
    return entries


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a table. Raises `DataError` for a table that is not UTF-8, or a line that is not JSON."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix.lower() == ".jsonl":
                for line, text in enumerate(file, 1):
                    if text.strip():
                        row = json.loads(text)
                        if not isinstance(row, dict):
                            raise DataError(f"{table} line {line}: not a JSON object")
                        yield line, row
                return
            reader = csv.DictReader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
            columns = reader.fieldnames or []
            for wanted in (PATH_COLUMNS, CAPTION_COLUMNS):
                if not set(wanted) & set(columns):
                    found = ", ".join(columns) or "none"
                    raise DataError(f"{table} needs a column {' or '.join(wanted)}; it has {found}")
            for row in reader:
                yield reader.line_num, row
    except json.JSONDecodeError as error:
        raise DataError(f"{table} line {line}: not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8 text") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"cannot read {table}: {error}") from error


def sample_id(name: str) -> str:
    """An id that is safe as a tar member: letters and digits of any script, `_`, `-`, and `/` between folders."""
    parts = [part for part in unicodedata.normalize("NFC", name).split("/") if part not in ("", ".", "..")]
    key = "/".join(re.sub(r"[^\w-]+", "_", part) for part in parts) or "_"
    if key.startswith("__"):  # webdataset takes names such as __MACOSX__ for its own
        key = f"x{key}"
    if len(key.encode()) > MAX_ID_BYTES:
        digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:12]
        key = f"{key.encode()[: MAX_ID_BYTES - 13].decode(errors='ignore')}-{digest}"
    return key


def _unique(entries: list[Entry]) -> list[Entry]:
    """`entries` by id. Raises `DataError` for two of one id."""
    entries = sorted(entries, key=lambda entry: entry.id)
    for first, second in zip(entries, entries[1:], strict=False):
        if first.id == second.id:
            raise DataError(
                f"{first.name} and {second.name} both get the id {first.id!r}; rename one, or give ids in a table"
            )
    return entries


def _read(entry: Entry) -> bytes:
    try:
        return entry.path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a table's path holds a NUL
        raise _Skip(MISSING_PICTURE, _reason(error)) from error


def _sample(entry: Entry, content: bytes, settings: PackSettings) -> Sample:
    """The finished sample. Raises `_Skip`."""
    members = {"json": json.dumps(entry.record).encode()}
    try:
        if entry.json is not None:
            members["json"] = entry.json.read_bytes()
        if entry.text is not None:
            members["txt"] = entry.text.read_bytes()
        sample = Sample.from_members(entry.id, {"png": content, **members})
        sample.require_captions()
        sample.to_members()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell
        raise _Skip(MISSING_CAPTION, "its text is not valid Unicode") from error
    except (DataError, OSError) as error:
        raise _Skip(MISSING_CAPTION, _reason(error)) from error
    sample.id = entry.id  # not one that a .json beside the picture names: ids must be unique here
    if UNKNOWN_LANGUAGE in sample.captions:
        sample.captions.setdefault(settings.language, sample.captions.pop(UNKNOWN_LANGUAGE))
    try:
        image = open_image(content, settings.max_pixels)  # decoded in any case, so that nothing corrupt is packed
        extension = read_header(content)[2]  # of the bytes: the name of the file may be wrong
    except ImageTooLarge as error:
        raise _Skip(TOO_LARGE, str(error)) from error
    except DataError as error:
        raise _Skip(CORRUPT_IMAGE, str(error)) from error
    if settings.image_size is not None:
        sample.image, sample.extension = _encode(to_square(image, settings.image_size), "webp"), "webp"
    elif extension in IMAGE_EXTENSIONS:
        sample.image, sample.extension = content, extension
    else:
        sample.image, sample.extension = _encode(image, "png"), "png"
    return sample


def _reason(error: Exception) -> str:
    """The message without the path, so that the logs of two machines are equal."""
    return getattr(error, "strerror", None) or str(error)


def _encode(image: Image.Image, extension: str) -> bytes:
    file = io.BytesIO()
    if extension == "webp":
        image.save(file, "WEBP", lossless=True, method=1, quality=50)
    else:
        image.save(file, "PNG")
    return file.getvalue()


def _fraction(content: bytes) -> float:
    """A number in [0, 1) from a hash of the bytes."""
    return int.from_bytes(hashlib.sha256(content).digest()[:6]) / 2**48
