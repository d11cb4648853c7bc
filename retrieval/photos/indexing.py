"""Brings the collection of a folder of pictures up to date: adds what is new or changed, drops what is gone.

The collection itself is the record of what was done: a run that is killed at any moment is continued by the next.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from PIL import Image

from data.atomic import write_file
from data.batches import cores, in_order
from data.photos.decoding import DecodedPhoto, PhotoDecoder, PhotoJob, UnreadablePhoto
from data.photos.files import FoundPhotos, PhotoFile, PhotoSettings, find_photos
from data.sample import DataError
from retrieval.collections.base import Collection, CollectionError, Item
from retrieval.collections.opening import open_collection
from retrieval.photos.places import (
    LOCK,
    OWN_FOLDER,
    TABLE_FOLDER,
    PhotoPlace,
    default_place,
    photo_id,
    read_place,
    stored_path,
    write_place,
)
from retrieval.towers.base import Towers
from vqvae.storage.parts import content_hash

BATCH = 16  # pictures in one forward pass: with one thread, larger ones are no faster
STORE_ROWS, STORE_SECONDS = 512, 20.0  # what a killed run loses at most
IDS_AT_ONCE = 5_000
BAR = "{percentage:3.0f}% {n_fmt}/{total_fmt} pictures, {rate_fmt}, ends {eta:%H:%M:%S}"
NOT_LISTED = "folder not listed"


@dataclass(frozen=True)
class PhotoRequest:
    """What `index_photos` is asked for. `settings` None: those of last time; `collection` None: the default place."""

    folder: Path
    collection: Path | None = None
    settings: PhotoSettings | None = None
    model: str = ""  # how the user calls the towers, for the record
    rebuild: bool = False
    workers: int | None = None  # one a core
    by: str = "towers"  # which part of the model makes the vectors, for the record


@dataclass
class PhotoReport:
    """Pictures in the collection, and what this run changed: `moved` ones have another name and the same content."""

    folder: str
    collection: str
    items: int = 0
    added: int = 0
    changed: int = 0
    moved: int = 0
    dropped: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> files
    log: str = ""
    seconds: float = 0.0


class _State(NamedTuple):
    """What the collection says of a file."""

    size: int
    changed: int
    content: str


class _Task(NamedTuple):
    id: str
    photo: PhotoFile
    job: PhotoJob
    future: Future[DecodedPhoto | UnreadablePhoto]


def index_photos(load_towers: Callable[[], Towers], request: PhotoRequest, *, progress: bool = False) -> PhotoReport:
    """Make the collection of the pictures in a folder, or bring it up to date.

    A file whose size and time of change are those of the last run is not opened. Memory is bounded, whatever the folder
    holds, but for the list of its files. Pictures that cannot be read are counted and named in the log.

    Raises `DataError` for a folder without a readable picture, in which case nothing is made or dropped, and
    `CollectionError` for a collection of another folder or of other towers, or one that another process updates.
    """
    started = time.monotonic()
    folder = request.folder.expanduser().resolve()
    location = request.collection or default_place(folder)
    old = _check_place(location, folder, request.rebuild)
    settings = request.settings or (old.settings if old else PhotoSettings())
    found = find_photos(folder, settings)
    if not found.photos:
        raise DataError(f"{folder} holds no pictures (left out are hidden files, thumbnails, bins and --exclude)")
    made = not location.exists()
    (location / OWN_FOLDER).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(location / OWN_FOLDER / LOCK, timeout=0):
            if request.rebuild:
                shutil.rmtree(location / TABLE_FOLDER, ignore_errors=True)
            place = PhotoPlace(location, folder, settings, request.model, by=request.by)
            report = _Update(place, load_towers, found, progress).run(request.workers or cores())
    except Timeout as error:
        raise CollectionError(f"{location} is being updated by another process: wait for its end") from error
    finally:
        if not (location / TABLE_FOLDER).is_dir():
            shutil.rmtree(location if made else location / OWN_FOLDER, ignore_errors=True)
    report.seconds = round(time.monotonic() - started, 3)
    return report


def _check_place(location: Path, folder: Path, rebuild: bool) -> PhotoPlace | None:
    """The record at `location`, if there is one. Raises `CollectionError` if it is of another folder that exists."""
    old = None if rebuild else read_place(location)
    if old is not None and old.folder != folder and old.folder.exists():  # else the folder was moved
        raise CollectionError(
            f"{location} holds the pictures of {old.folder}: choose another --collection, or use --rebuild"
        )
    if not (location / OWN_FOLDER).is_dir() and location.exists() and any(location.iterdir()):
        raise CollectionError(f"{location} holds other files, or another kind of collection: choose another place")
    return old


class _Update:
    """One run of `index_photos`, after the checks."""

    towers: Towers  # once there is something to embed

    def __init__(
        self, place: PhotoPlace, load_towers: Callable[[], Towers], found: FoundPhotos, progress: bool
    ) -> None:
        self.place, self.load_towers, self.found, self.progress = place, load_towers, found, progress
        self.photos = {photo_id(stored_path(photo.path)): photo for photo in found.photos}
        self.report = PhotoReport(str(place.folder), str(place.collection), log=str(place.log))
        self.skipped: list[tuple[str, str, str]] = [
            (NOT_LISTED, path, problem) for path, problem in found.unlisted.items()
        ]
        self.failed: set[str] = set()
        self.collection: Collection | None = None
        self.stored: dict[str, _State] = {}
        self._rows: list[Item] = []
        self._written = time.monotonic()

    def run(self, workers: int) -> PhotoReport:
        try:
            if (self.place.collection / TABLE_FOLDER).is_dir():
                self.collection = open_collection(self.place.collection)
                self.stored = _read_states(self.collection)
            pending = [name for name, photo in self.photos.items() if not self._is_known(name, photo)]
            if pending:
                self._load()
                self._embed(pending, workers)
            if self.collection is None:
                _, path, problem = self.skipped[-1]
                raise DataError(
                    f"none of the {len(self.photos)} pictures in {self.place.folder} can be read; {path}: {problem}"
                )
            self._drop()
            self.report.items = self.collection.count()
            if self.report.added + self.report.changed + self.report.moved + self.report.dropped:
                self.collection.optimise()
            self._write_log()
        finally:
            if self.collection is not None:
                self.collection.close()
        return self.report

    @property
    def _opened(self) -> Collection:
        assert self.collection is not None
        return self.collection

    def _load(self) -> None:
        """Load the towers. Raises `CollectionError` if the collection holds vectors of others."""
        self.towers = self.load_towers()
        if self.collection is not None and self.collection.model != (found := content_hash(self.towers)):
            hashes = f"{self.collection.model[:12]}, not {found[:12]}"
            raise CollectionError(
                f"{self.place.collection} holds vectors of other towers ({hashes}): use the model that made them, by "
                "the part that made them (--by), or --rebuild"
            )

    def _embed(self, pending: list[str], workers: int) -> None:
        """Store a vector of each of these files, which are new or changed."""
        from tqdm import tqdm

        sources = self._sources()
        total = len(pending)
        with (
            PhotoDecoder(min(workers, total)) as decoder,
            tqdm(total=total, unit=" pictures", bar_format=BAR, disable=not self.progress) as bar,
        ):

            def work(batch: list[_Task]) -> list[tuple[_Task, Item | UnreadablePhoto]]:
                decoded = decoder.collect([task.job for task in batch], [task.future for task in batch])
                return list(zip(batch, self._items(batch, decoded, sources), strict=True))

            batches = (self._submit(decoder, pending[k : k + BATCH], sources) for k in range(0, total, BATCH))
            try:
                with closing(in_order(work, batches, workers)) as done:
                    for results in done:
                        for task, result in results:
                            self._take(task, result)
                        bar.update(len(results))
            finally:  # also when it is interrupted
                self._store()

    def _is_known(self, name: str, photo: PhotoFile) -> bool:
        state = self.stored.get(name)
        return state is not None and (state.size, state.changed) == (photo.size, photo.changed)

    def _sources(self) -> dict[int, dict[str, str]]:
        """Size -> content -> id of the stored pictures whose files have gone or changed: they may have moved."""
        sources: dict[int, dict[str, str]] = {}
        for name, state in self.stored.items():
            photo = self.photos.get(name)
            if photo is None or not self._is_known(name, photo):
                sources.setdefault(state.size, {})[state.content] = name
        return sources

    def _submit(self, decoder: PhotoDecoder, names: list[str], sources: Mapping[int, Mapping[str, str]]) -> list[_Task]:
        jobs = [
            PhotoJob(
                str(self.place.folder / self.photos[name].path),
                self.towers.image_size,
                frozenset(sources.get(self.photos[name].size, ())),
            )
            for name in names
        ]
        return [
            _Task(name, self.photos[name], job, future)
            for name, job, future in zip(names, jobs, decoder.submit(jobs), strict=True)
        ]

    def _items(
        self,
        batch: list[_Task],
        decoded: list[DecodedPhoto | UnreadablePhoto],
        sources: Mapping[int, Mapping[str, str]],
    ) -> Iterator[Item | UnreadablePhoto]:
        """An item of each picture that was decoded, or whose vector is stored under another name or time."""
        pixels = [
            self.towers.preprocess(Image.fromarray(one.pixels))
            for one in decoded
            if isinstance(one, DecodedPhoto) and one.pixels is not None
        ]
        vectors = iter(self.towers.encode_image(torch.stack(pixels), BATCH) if pixels else ())
        for task, one in zip(batch, decoded, strict=True):
            if isinstance(one, UnreadablePhoto):
                yield one
                continue
            photo = task.photo
            metadata: dict[str, Any] = {"kind": "image", "path": stored_path(photo.path), "size": photo.size}
            metadata |= {"changed": photo.changed, "content": one.content}
            if one.taken:
                metadata["taken"] = one.taken
            if one.pixels is not None:
                yield Item(task.id, next(vectors).numpy(), metadata)
            else:
                (source,) = self._opened.get([sources[photo.size][one.content]])
                yield Item(task.id, source.vector, source.metadata | metadata)

    def _take(self, task: _Task, result: Item | UnreadablePhoto) -> None:
        if isinstance(result, UnreadablePhoto):
            self.failed.add(task.id)
            self.skipped.append((result.reason, task.photo.path, result.problem))
            return
        state = self.stored.get(task.id)
        if task.id in self.stored:
            self.report.changed += state is not None and state.content != result.metadata["content"]
        elif task.job.known and result.metadata["content"] in task.job.known:
            self.report.moved += 1
        else:
            self.report.added += 1
        self._rows.append(result)
        if len(self._rows) >= STORE_ROWS or time.monotonic() - self._written > STORE_SECONDS:
            self._store()

    def _store(self) -> None:
        if not self._rows:
            return
        if self.collection is None:
            self._create()
        self._opened.upsert(self._rows)
        self._rows, self._written = [], time.monotonic()

    def _create(self) -> None:
        self.collection = open_collection(
            self.place.collection, create=True, dim=self.towers.embed_dim, model=content_hash(self.towers)
        )
        write_place(self.place)

    def _drop(self) -> None:
        """Remove the items of files that have gone or can no longer be read; a folder that is not listed keeps its."""
        kept = tuple(stored_path(path) + "/" for path in self.found.unlisted)
        gone = [
            name
            for name in self.stored
            if name in self.failed or (name not in self.photos and not name.startswith(kept))
        ]
        if gone:
            self.report.dropped = self._opened.delete(gone)

    def _write_log(self) -> None:
        self.report.skipped = dict(sorted(Counter(reason for reason, _, _ in self.skipped).items()))
        write_place(self.place)  # new settings hold from now on
        lines = ["\t".join(" ".join(part.split()) for part in entry) + "\n" for entry in self.skipped]
        write_file(self.place.log, "".join(lines).encode("utf-8", "backslashreplace"))


def _read_states(collection: Collection) -> dict[str, _State]:
    """Id -> what is stored of each picture."""
    names = [name for ids, _ in collection.scan() for name in ids]
    states = {}
    for start in range(0, len(names), IDS_AT_ONCE):
        for item in collection.get(names[start : start + IDS_AT_ONCE]):
            size, changed, content = (item.metadata.get(name) for name in ("size", "changed", "content"))
            # an item that was added by hand is no file: it is dropped as one that has gone
            states[item.id] = _State(int(size or -1), int(changed or -1), str(content))
    return states
