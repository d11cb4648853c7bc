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
import shutil
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data.images import MAX_PIXELS, ImageTooLarge, open_image, read_header, to_square
from data.reading import CORRUPT_IMAGE, MISSING_CAPTION, MISSING_PICTURE, TOO_LARGE, SkipLog
from data.sample import IMAGE_EXTENSIONS, UNKNOWN_LANGUAGE, DataError, Sample
from data.shards import Manifest, ShardWriter, write_manifest

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


def pack(
    source: Path | str,
    out: Path | str,
    *,
    image_size: int | None = None,
    language: str = UNKNOWN_LANGUAGE,
    samples_per_shard: int = 2000,
    max_pixels: int = MAX_PIXELS,
    strict: bool = False,
    test_fraction: float = 0.0,
    progress: bool = True,
) -> Manifest:
    """Pack the pictures of `source` (a folder or a table) into the new folder `out`; the same input, the same bytes.

    `image_size`: pixels; the shorter side is resized to it, the centre cropped, the square stored as lossless WebP.
    None stores PNG, WebP and JPEG files as they are, others as PNG. `language` is that of captions which name none.
    `test_fraction` of the pictures, chosen by a hash of their bytes (so equal ones stay together), become `test`.
    `max_pixels` caps width x height. What cannot be packed is counted in the manifest and named in `skipped.log`;
    `strict` stops there instead.

    Raises `DataError` for bad arguments, an `out` that is not empty, two samples of one id, or nothing to pack;
    `out` then stays as it was.
    """
    from tqdm import tqdm

    source, out = Path(source), Path(out)
    if image_size is not None and not 8 <= image_size <= 4096:
        raise DataError(f"the image size is 8 to 4096 pixels, not {image_size}")
    if not 0 <= test_fraction < 1:
        raise DataError(f"the test fraction lies in [0, 1), not {test_fraction}")
    if not LANGUAGE_TAG.fullmatch(language):
        raise DataError(f"{language!r} is no language code such as zh, en or und")
    if samples_per_shard < 1:
        raise DataError(f"samples per shard must be at least 1, not {samples_per_shard}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not empty; choose another folder")
    entries = _unique(_entries(source))
    splits = ("train", "test") if test_fraction else ("train",)
    building = out.absolute().parent / f".{out.absolute().name}.partial-{os.getpid()}"
    try:
        building.mkdir(parents=True)
        log = SkipLog(building / "skipped.log")
        with ExitStack() as stack:
            writers = {s: stack.enter_context(ShardWriter(building, s, samples_per_shard)) for s in splits}
            for entry in tqdm(entries, "packing", disable=not progress):
                try:
                    content = _read(entry)
                    sample = _sample(entry, content, language, image_size, max_pixels)
                except _Skip as skip:
                    if strict:
                        raise DataError(f"{entry.name}: {skip}") from skip
                    log.add(skip.reason, entry.name, str(skip))
                    continue
                writers["test" if _fraction(content) < test_fraction else "train"].write(sample)
        manifest = Manifest(
            name=source.resolve().stem,
            image_size=image_size,
            splits={split: writer.shards for split, writer in writers.items()},
            sources={"pack": {"source": source.resolve().name, "language": language, "test_fraction": test_fraction}},
            skipped=log.counts,
        )
        if not any(manifest.splits.values()):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in log.counts.items())
            raise DataError(f"nothing to pack in {source} ({reasons})")
        write_manifest(building, manifest)
        if out.exists():
            out.rmdir()
        building.rename(out)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)  # gone already where all went well
    return manifest


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


def _sample(entry: Entry, content: bytes, language: str, image_size: int | None, max_pixels: int) -> Sample:
    """The finished sample. Raises `_Skip`."""
    members = {"json": json.dumps(entry.record).encode()}
    try:
        if entry.json is not None:
            members["json"] = entry.json.read_bytes()
        if entry.text is not None:
            members["txt"] = entry.text.read_bytes()
        sample = Sample.from_members(entry.id, {"png": content, **members})
        sample.to_members()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell
        raise _Skip(MISSING_CAPTION, "its text is not valid Unicode") from error
    except (DataError, OSError) as error:
        raise _Skip(MISSING_CAPTION, _reason(error)) from error
    sample.id = entry.id  # not one that a .json beside the picture names: ids must be unique here
    if UNKNOWN_LANGUAGE in sample.captions:
        sample.captions.setdefault(language, sample.captions.pop(UNKNOWN_LANGUAGE))
    try:
        image = open_image(content, max_pixels)  # decoded in any case, so that nothing corrupt is packed
        extension = read_header(content)[2]  # of the bytes: the name of the file may be wrong
    except ImageTooLarge as error:
        raise _Skip(TOO_LARGE, str(error)) from error
    except DataError as error:
        raise _Skip(CORRUPT_IMAGE, str(error)) from error
    if image_size is not None:
        sample.image, sample.extension = _encode(to_square(image, image_size), "webp"), "webp"
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
