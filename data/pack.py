"""Your own pictures and captions to shards: a folder of images with `.txt` or `.json` beside them, or a table of paths.

A table is CSV, TSV or JSONL with the columns path (or image, file_name) and caption (or text, title), and if you like
id, language, family, licence and source. `data.entries` reads both.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data.atomic import check_unused, new_folder
from data.characters import whole_characters
from data.entries import Entry, list_entries
from data.images import ImageTooLarge, open_image, read_header, to_square
from data.reading import CORRUPT_IMAGE, DOUBLED_MEMBER, MISSING_CAPTION, MISSING_PICTURE, TOO_LARGE, Skip, SkipLog
from data.sample import UNKNOWN_LANGUAGE, DataError, DoubledMember, Sample, language_code
from data.settings import PackSettings
from data.shards import Manifest, ShardInfo, ShardWriter, write_manifest

STORED_AS_THEY_ARE = ("png", "webp", "jpg")


class _Skip(DataError):
    """A sample that cannot be packed, and the reason it is counted under."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


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
    entries = list_entries(source)
    try:
        with new_folder(out) as building:
            log = SkipLog(building / "skipped.log")
            splits = _write_shards(building, tqdm(entries, "packing", disable=not progress), settings, log)
            if not any(splits.values()):
                reasons = ", ".join(f"{reason}: {count}" for reason, count in log.counts.items())
                first = ": ".join((building / "skipped.log").read_text(encoding="utf-8").split("\n")[0].split("\t")[1:])
                raise DataError(f"nothing to pack in {source} ({reasons}); the first: {first}")
            recipe = {"language": settings.language, "test_fraction": settings.test_fraction}
            manifest = Manifest(
                name=whole_characters(source.resolve().stem),
                image_size=settings.image_size,
                splits=splits,
                sources={"pack": {"source": whole_characters(source.resolve().name), **recipe}},
                skipped=log.counts,
            )
            write_manifest(building, manifest)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}") from error
    return manifest


def _write_shards(
    folder: Path, entries: Iterable[Entry | Skip], settings: PackSettings, log: SkipLog
) -> dict[str, list[ShardInfo]]:
    """Write the shards of each split into `folder`."""
    names = ("train", "test") if settings.test_fraction else ("train",)
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(ShardWriter(folder, name, settings.samples_per_shard)) for name in names
        }
        for entry in entries:
            if isinstance(entry, Skip):
                log.take(entry, settings.strict)
                continue
            try:
                content = _read(entry)
                sample = _sample(entry, content, settings)
            except _Skip as skip:
                log.take(Skip(skip.reason, entry.name, skip), settings.strict)
                continue
            writers["test" if _fraction(content) < settings.test_fraction else "train"].write(sample)
    return {name: writer.shards for name, writer in writers.items()}


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
        if not settings.uncaptioned and not sample.questions:
            sample.require_captions()
    except (DataError, OSError) as error:
        raise _Skip(DOUBLED_MEMBER if isinstance(error, DoubledMember) else MISSING_CAPTION, _reason(error)) from error
    sample.id = entry.id  # not one that a .json beside the picture names: ids must be unique here
    if UNKNOWN_LANGUAGE in sample.captions:
        sample.captions.setdefault(language_code(settings.language), sample.captions.pop(UNKNOWN_LANGUAGE))
    try:
        image = open_image(content, settings.max_pixels)  # decoded in any case, so that nothing corrupt is packed
        extension = read_header(content)[2]  # of the bytes: the name of the file may be wrong
    except ImageTooLarge as error:
        raise _Skip(TOO_LARGE, str(error)) from error
    except DataError as error:
        raise _Skip(CORRUPT_IMAGE, str(error)) from error
    if settings.image_size is not None:
        sample.image, sample.extension = _encode(to_square(image, settings.image_size), "webp"), "webp"
    elif extension in STORED_AS_THEY_ARE:
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
