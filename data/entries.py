"""What a folder or a table of pictures lists to be packed, and what is wrong with the rest of it.

What looks like a picture, a caption or a row and is no entry is a `Skip` with a reason, a name and the problem.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from data.characters import encoding_of
from data.images import read_header
from data.reading import MISSING_PICTURE, Skip
from data.records import parse_json
from data.sample import UNKNOWN_LANGUAGE, DataError, is_language
from data.shards import MAX_NAME_BYTES

PICTURE_SUFFIXES = frozenset(
    (".png", ".webp", ".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".gif", ".bmp", ".tif", ".tiff", ".avif")
)
# pictures of formats that are not read; files of other suffixes are opened to see whether they are pictures
UNREAD_SUFFIXES = frozenset(
    (".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2")
)
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".json")
PATH_COLUMNS = ("path", "image", "filepath", "file_name", "filename", "image_path")
CAPTION_COLUMNS = ("caption", "text", "title")
SEPARATORS = {".csv": (",", ";", "\t"), ".tsv": ("\t",)}  # Excel writes ; where numbers have decimal commas

BROKEN_ROW = "broken row"
NO_PICTURE_FILE = "no picture file"


@dataclass(frozen=True)
class Entry:
    """A picture to pack. `name` is what the user calls it, `key` what its id is made of, `record` its JSON.

    `text` and `json` are files beside the picture, whose captions take the place of those of the record.
    """

    id: str
    path: Path
    name: str
    key: str
    record: dict[str, Any]
    text: Path | None = None
    json: Path | None = None


def list_entries(source: Path) -> list[Entry | Skip]:
    """The entries of a folder or a table in the order of their ids, which are distinct, and behind them the skips.

    Raises `DataError` for neither, a table that cannot be read to its end, and one that gives an id twice.
    """
    if source.is_dir():
        found = list(_folder_entries(source))
    elif not source.is_file():
        raise DataError(f"no folder or file at {source}")
    elif source.suffix.lower() not in TABLE_SUFFIXES:
        raise DataError(f"{source} is no folder, and no {', '.join(TABLE_SUFFIXES)} table of paths and captions")
    else:
        found = list(_table_entries(source))
        if not found:
            raise DataError(f"{source} holds no row")
    entries = [entry for entry in found if isinstance(entry, Entry)]
    if source.is_dir() and not entries:
        raise DataError(f"{source} holds no picture ({', '.join(sorted(PICTURE_SUFFIXES))})")
    return [*_distinct(entries), *(skip for skip in found if isinstance(skip, Skip))]


def sample_id(key: str) -> str:
    """An id that is safe as a tar member: letters, marks and digits of any script, `_`, `-`, `/` between folders.

    Different keys may have the same id: see `_distinct`.
    """
    parts = [part for part in unicodedata.normalize("NFC", key).split("/") if part not in ("", ".", "..")]
    name = "/".join(re.sub(r"[^\w-]+", _marks_alone, part) for part in parts) or "_"
    if name.startswith("__"):  # webdataset takes names such as __MACOSX__ for its own
        name = f"x{name}"
    return _with_digest(name, key) if len(name.encode()) > MAX_NAME_BYTES else name


def _marks_alone(match: re.Match[str]) -> str:
    """Vowel signs and the like, which are part of their letters, as they are; what stands between them as `_`."""
    kept = (c if unicodedata.category(c).startswith("M") else "\0" for c in match[0])
    return re.sub("\0+", "_", "".join(kept))


def _with_digest(name: str, key: str) -> str:
    digest = hashlib.sha256(key.encode("utf-8", "backslashreplace")).hexdigest()[:12]
    return f"{name.encode()[: MAX_NAME_BYTES - 13].decode(errors='ignore')}-{digest}"


def _distinct(entries: list[Entry]) -> list[Entry]:
    """`entries` in the order of their ids; where keys share an id, each gets a digest of its key.

    Raises `DataError` for a key that is given twice.
    """
    counts = Counter(entry.id for entry in entries)
    named: dict[str, Entry] = {}
    for entry in entries:
        shared = entry.id
        if counts[shared] > 1:
            entry = replace(entry, id=_with_digest(shared, entry.key))
        first = named.setdefault(entry.id, entry)
        if first is not entry:
            raise DataError(
                f"{first.name} and {entry.name} both get the id {shared!r}: rename one, or give ids in a table"
            )
    return sorted(named.values(), key=lambda entry: entry.id)


def _folder_entries(folder: Path) -> Iterator[Entry | Skip]:
    pictures: list[Path] = []
    texts: dict[tuple[Path, str], Path] = {}  # path without suffix, suffix in lower case -> file
    for found in _files(folder):
        if isinstance(found, Skip):
            yield found
        elif found.suffix.lower() in TEXT_SUFFIXES:
            first = texts.setdefault((found.with_suffix(""), found.suffix.lower()), found)
            if first is not found:
                yield _left_out(folder, found, f"{first.name} is read in its place: leave one out")
        elif found.suffix.lower() in UNREAD_SUFFIXES:
            yield _left_out(folder, found, "a picture of a format that is not read: convert it to PNG or JPEG")
        elif found.suffix.lower() in PICTURE_SUFFIXES or _is_picture(found):
            pictures.append(found)
    used = set()
    for path in pictures:
        text, record = (texts.get((path.with_suffix(""), suffix)) for suffix in TEXT_SUFFIXES)
        used |= {text, record}
        name = path.relative_to(folder)
        yield Entry(
            id=sample_id(name.with_suffix("").as_posix()),
            path=path,
            name=name.as_posix(),
            key=name.as_posix(),
            record={},
            text=text,
            json=record,
        )
    for path in sorted(set(texts.values()) - used):
        yield _left_out(folder, path, "no picture of that name beside it")


def _files(folder: Path) -> Iterator[Path | Skip]:
    """The files of a folder and its subfolders, links followed. Hidden files are left out: thumbnails and the like."""
    problems: list[OSError] = []
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=problems.append):
        if (place := os.path.realpath(parent)) in visited:
            folders.clear()
            yield _left_out(folder, Path(parent), "a link to a folder that is read already")
            continue
        visited.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith("."):
                yield path if path.is_file() else _left_out(folder, path, "a broken link, or no file")
    for error in problems:
        yield _left_out(folder, Path(error.filename), error.strerror or str(error))


def _left_out(folder: Path, path: Path, problem: str) -> Skip:
    return Skip(NO_PICTURE_FILE, path.relative_to(folder).as_posix(), DataError(problem))


def _is_picture(path: Path) -> bool:
    """Whether a file with the suffix of no picture is one all the same."""
    try:
        read_header(path)
    except (DataError, OSError):
        return False
    return True


def _table_entries(table: Path) -> Iterator[Entry | Skip]:
    for line, row in _rows(table):
        if not isinstance(row, str) and any(map(_not_utf8, (row[name] for name in row if name not in PATH_COLUMNS))):
            row = "not UTF-8 text"
        if isinstance(row, str):
            yield Skip(BROKEN_ROW, f"{table.name} line {line}", DataError(row))
            continue
        path = next((row[column] for column in PATH_COLUMNS if row.get(column)), None)
        if not isinstance(path, str):
            problem = f"no path (columns read: {', '.join(PATH_COLUMNS)})"
            yield Skip(MISSING_PICTURE, f"{table.name} line {line}", DataError(problem))
            continue
        if re.match(r"\s*(https?|s3|gs|ftp)://", path):
            problem = "a URL, and nothing is fetched: download the pictures first, with img2dataset for instance"
            yield Skip(MISSING_PICTURE, f"{path} (line {line})", DataError(problem))
            continue
        caption = next((row[column] for column in CAPTION_COLUMNS if row.get(column)), None)
        language = row.get("language") or UNKNOWN_LANGUAGE
        if not isinstance(language, str) or not is_language(language):
            problem = f"{language!r} is no language code such as zh, en or und"
            yield Skip(BROKEN_ROW, f"{path} (line {line})", DataError(problem))
            continue
        record = {key: row[key] for key in ("captions", "family", "licence", "source", "questions") if row.get(key)}
        if "captions" not in record and caption:
            # captions by language name their own
            record["captions"] = caption if isinstance(caption, dict) else {language: caption}
        given = row.get("id")
        key = str(given) if given not in (None, "") else path.replace("\\", "/")
        yield Entry(
            id=sample_id(key if given not in (None, "") else os.path.splitext(key)[0]),
            path=_picture_path(table.parent, path),
            name=f"{path} (line {line})",
            key=key,
            record=record,
        )


def _not_utf8(value: object) -> bool:
    """Whether a text holds bytes that are not UTF-8, as `surrogateescape` spells them."""
    return isinstance(value, str) and re.search("[\udc80-\udcff]", value) is not None


def _picture_path(folder: Path, path: str) -> Path:
    """The file that a table names: as it stands there if that exists, else as Windows, a shell or a URI spells it."""
    if os.path.lexists(folder / path):
        return folder / path
    spelled = path.strip()
    if spelled.startswith("file://"):
        spelled = unquote(urlsplit(spelled).path)
    if "\\" in spelled and not os.path.lexists(folder / spelled):
        spelled = spelled.replace("\\", "/")
    with suppress(RuntimeError):  # ~ of a user whom nobody knows
        return folder / Path(spelled).expanduser()
    return folder / spelled


def _rows(table: Path) -> Iterator[tuple[int | str, dict[str, Any] | str]]:
    """(line, row) of a table; (line or lines, problem) for one that cannot be read.

    Raises `DataError` for a table that is no text or has no columns to read, or a quotation mark without an end.
    """
    try:
        with table.open("rb") as binary:
            encoding = encoding_of(binary.read(4))
        # bytes that are not UTF-8 become surrogates: rows that hold them in a caption are skipped one by one
        with table.open(encoding=encoding, errors="surrogateescape", newline="") as file:
            yield from _csv_rows(table, file) if table.suffix.lower() in SEPARATORS else _json_rows(file)
    except UnicodeError as error:
        raise DataError(f"{table} is not UTF-8 text") from error
    except OSError as error:
        raise DataError(f"cannot read {table}: {error}") from error


def _json_rows(file: Any) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = parse_json(text)
        except ValueError as error:
            yield line, f"not JSON ({error})"
            continue
        if isinstance(row, list):
            yield line, "a JSON list: write one object a line"
        else:
            yield line, row if isinstance(row, dict) else "not a JSON object"


def _csv_rows(table: Path, file: Any) -> Iterator[tuple[int | str, dict[str, Any] | str]]:
    header, end = file.readline(), 1
    if re.fullmatch(r'"?sep=.?"?\s*', header, re.IGNORECASE):  # Excel's own line, which names the separator
        header, end = file.readline(), 2
    separator, columns = _columns(table, header)
    # strict: a quotation mark that never closes would take all that follows into one caption
    reader = csv.reader(file, delimiter=separator, strict=True)
    first = end
    while True:
        start = end + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            end = reader.line_num + first
            if "field limit" in str(error) and start == end:
                yield start, f"a cell of more than {csv.field_size_limit():,} characters"
                continue
            if "unexpected end" in str(error) or "field limit" in str(error):
                raise DataError(f"{table}: a quotation mark opened in line {start} is never closed") from error
            yield _lines(start, end), f"quotation marks that do not fit together ({error})"
            continue
        end = reader.line_num + first
        if not any(cells):
            continue
        if len(cells) != len(columns):
            yield _lines(start, end), f"{len(cells)} cells, where the header has {len(columns)} columns"
        elif end > start and _holds_rows(cells, columns, separator):
            yield _lines(start, end), "a quotation mark that closes rows later: a caption holds other rows"
        else:
            yield _lines(start, end), dict(zip(columns, cells, strict=True))


def _lines(start: int, end: int) -> int | str:
    return start if start == end else f"{start} to {end}"


def _columns(table: Path, header: str) -> tuple[str, list[str]]:
    """The separator of a table and the names of its columns, in lower case. Raises `DataError`."""
    columns: list[str] = []
    for separator in SEPARATORS[table.suffix.lower()]:
        named = [name.strip().lower() for name in next(csv.reader([header], delimiter=separator), [])]
        columns = columns or named
        if set(PATH_COLUMNS) & set(named) and set(CAPTION_COLUMNS) & set(named):
            twice = [name for name, count in Counter(named).items() if count > 1 and name]
            if twice:
                raise DataError(f"{table} has two columns {twice[0]!r}: rename one")
            return separator, named
    wanted = next(names for names in (PATH_COLUMNS, CAPTION_COLUMNS) if not set(names) & set(columns))
    raise DataError(f"{table} needs a column {' or '.join(wanted)}; it has {', '.join(columns) or 'none'}")


def _holds_rows(cells: list[str], columns: list[str], separator: str) -> bool:
    """Whether a cell of several lines holds what would be rows of their own."""
    place = next(columns.index(name) for name in PATH_COLUMNS if name in columns)
    for line in (line for cell in cells for line in cell.splitlines()[1:]):
        parts = line.split(separator)
        if place < len(parts) > 1 and os.path.splitext(parts[place].strip())[1].lower() in PICTURE_SUFFIXES:
            return True
    return False
