"""What the buttons do, without the page: they check input, write results to files, and raise `ValueError`."""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from tempfile import mkdtemp
from threading import Event
from typing import Any

from PIL import Image

from data.atomic import write_files
from data.images import CorruptImage, ImageTooLarge, open_image
from mmwudao.asking import Answer
from mmwudao.demo.library import Library, SearchResult
from mmwudao.demo.words import EN, Reason
from mmwudao.pictures import encode_png, unused_path, write_pictures
from mmwudao.pipeline import MAX_PROMPT, DrawingProgress, OnProgress, Pipeline, Sampling
from mmwudao.service.settings import ServiceConfig
from mmwudao.upscaling import check_size
from retrieval.collections.terms import read_query, split_query

LIMITS = ServiceConfig()  # the demo allows what the service allows
MAX_DRAWN = 8
MAX_CANDIDATES = 32
MAX_FOUND = 48
MAX_QUESTIONS = 16
PREVIEW_ROWS = 2  # rows of codes between two previews
KEPT_FOR = 3600  # seconds that results can be downloaded


class Refused(ValueError):
    """Bad input for which the page has a message in each language; the exception's own is the English one."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(EN.refusals[reason])
        self.reason = reason


class Stopped(Exception):
    """The user has pressed the stop button, or has closed the page."""


@dataclass(frozen=True)
class Preview:
    """Pictures while they are drawn, white where nothing is drawn yet; `share` in [0, 1] is done."""

    pictures: list[Image.Image]
    share: float


@dataclass(frozen=True)
class Result:
    """Files to show, a record of each, and the one file for download that holds all of them."""

    pictures: list[Path]
    infos: list[dict[str, Any]]
    download: Path
    hidden: int = 0  # found, but without a picture on this machine
    near: bool = True  # whether something was found that is nearer than chance
    read: str | None = None  # what the model has read of a prompt that is too long for it


@dataclass(frozen=True)
class Captions:
    """Language -> description, of those that are done; the last update has a JSON file of all."""

    told: dict[str, str]
    download: Path | None = None


class Actions:
    """What can be done with a model and a library. Results are files in folders under `folder`, kept for an hour."""

    def __init__(self, pipeline: Pipeline, library: Library | None, folder: Path) -> None:
        self.pipeline, self.library, self._folder = pipeline, library, folder
        self._stops: dict[str, Event] = {}

    def draw(
        self,
        prompt: str,
        n: int = 4,
        candidates: int = 0,
        seed: int | None = None,
        style: str | None = None,
        sampling: Sampling = None,
        session: str = "",
    ) -> Iterator[Preview | Result]:
        """Previews, and last `n` pictures, the best of `candidates` if these are more; the infos are recipes.

        `stop(session)` makes this raise `Stopped`.
        """
        _check_prompt(prompt)
        _check_count(n, MAX_DRAWN)
        _check_count(max(candidates, 1), MAX_CANDIDATES)

        def work(on_progress: OnProgress) -> list[Image.Image]:
            chosen_from = candidates if candidates > n else 0
            return self.pipeline.generate(
                prompt, n, seed, style, sampling, candidates=chosen_from, on_progress=on_progress
            )

        read = self.pipeline.read_part(self.pipeline.plan(prompt, style=style)[0].text)
        yield self._drawn((yield from self._previews(work, session, max(n, candidates))), read)

    def complete(
        self,
        picture: str | None,
        prompt: str,
        side: str = "top",
        share: float = 0.5,
        n: int = 4,
        seed: int | None = None,
        style: str | None = None,
        sampling: Sampling = None,
        session: str = "",
    ) -> Iterator[Preview | Result]:
        """Keeps the `share` of the picture at its `side`, top or left, and draws the rest; otherwise as `draw`."""
        image = open_upload(picture)
        _check_prompt(prompt)
        _check_count(n, MAX_DRAWN)

        def work(on_progress: OnProgress) -> list[Image.Image]:
            keep = f"{side}:{share:g}"
            return self.pipeline.complete(image, prompt, keep, n, seed, style, sampling, on_progress=on_progress)

        read = self.pipeline.read_part(self.pipeline.plan(prompt, style=style)[0].text)
        yield self._drawn((yield from self._previews(work, session, n)), read)

    def stop(self, session: str) -> None:
        """End the drawing of that session, if there is one."""
        if session in self._stops:
            self._stops[session].set()

    def caption(self, picture: str | None, languages: Sequence[str]) -> Iterator[Captions]:
        """What the picture shows; each update has one more language."""
        image = open_upload(picture)
        if not languages:
            raise Refused("no_language")
        told: dict[str, str] = {}
        for language in languages:
            told[language] = self.pipeline.caption([image], language or None)[0]
            yield Captions(dict(told))
        config = self.pipeline.config
        record = {"model": config.name, "model_hash": config.model_hash, "captions": told}
        path = self._new_folder() / "captions.json"
        path.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
        yield Captions(told, path)

    def ask(self, picture: str | None, text: str) -> list[Answer]:
        """The answer to each line of `text`, a question about the picture."""
        image = open_upload(picture)
        questions = [line.strip() for line in text.splitlines() if line.strip()]
        if not questions:
            raise Refused("no_question")
        if len(questions) > MAX_QUESTIONS:
            raise ValueError(f"{len(questions)} questions: at most {MAX_QUESTIONS} at a time")
        return self.pipeline.ask(image, questions)

    def upscale(self, picture: str | None) -> tuple[Path, Result]:
        """The picture stretched by Lanczos for comparison, and enlarged by the model."""
        image = open_upload(picture)
        check_size(image)
        (larger,) = self.pipeline.upscale([image])
        folder = self._new_folder()
        stretched, enlarged = folder / "stretched.png", folder / "enlarged.png"
        plain = image.resize(larger.size, Image.Resampling.LANCZOS)
        write_files({stretched: encode_png(plain), enlarged: encode_png(larger)})
        info = {"before": f"{image.width}×{image.height}", "after": f"{larger.width}×{larger.height}"}
        return stretched, Result([enlarged], [info], enlarged)

    def search(
        self, text: str = "", picture: str | None = None, family: str = "", where: str = "", k: int = 12
    ) -> Result:
        """The pictures nearest to a text or to a picture (a path), with their metadata."""
        assert self.library is not None
        if bool(text.strip()) == bool(picture):
            raise Refused("one_query")
        if len(text) > LIMITS.max_text:
            raise ValueError(f"a text of {len(text)} characters: at most {LIMITS.max_text}")
        _check_count(k, MAX_FOUND)
        # the text is a visitor's: it names no files
        query = open_upload(picture) if picture else read_query(split_query(text), files=False)
        found = self.library.search(query, k, family, where)
        least = self.library.near_from(query)
        folder = self._new_folder()
        paths, records = [], []
        for rank, one in enumerate(found, 1):
            records.append(_record(one))
            if one.picture is not None:
                paths.append(unused_path(folder, f"{rank:02d}-{_plain(one.id)}", f".{one.extension}"))
                write_files({paths[-1]: one.picture})
                records[-1]["file"] = paths[-1].name
        listing = folder / "results.json"
        listing.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
        shown = [record for record in records if "file" in record]
        packed = _pack(folder / "search.zip", [listing, *paths])
        near = least is None or any(one.score >= least for one in found)
        return Result(paths, shown, packed, len(found) - len(paths), near)

    def add(self, picture: str | None, description: str = "") -> int:
        """Store a picture of the user's in the library; return how many pictures it has now."""
        assert self.library is not None
        if len(description) > MAX_PROMPT:
            raise Refused("no_description")
        return self.library.add(open_upload(picture), description)

    def _previews(
        self, work: Callable[[OnProgress], list[Image.Image]], session: str, count: int
    ) -> Generator[Preview, None, list[Image.Image]]:
        """Run `work`, which draws `count` pictures, in a thread of its own. Closing this generator stops it."""
        updates = SimpleQueue[Preview | None]()
        stop = self._stops[session] = Event()
        shown = -1

        def on_progress(progress: DrawingProgress) -> None:
            nonlocal shown
            if stop.is_set():
                raise Stopped
            if progress.rows // PREVIEW_ROWS != shown:
                shown = progress.rows // PREVIEW_ROWS
                updates.put(Preview(progress.preview(), progress.done / progress.total))

        side = self.pipeline.config.image_size
        with ThreadPoolExecutor(1, thread_name_prefix="draw") as executor:
            future = executor.submit(work, on_progress)
            future.add_done_callback(lambda _: updates.put(None))
            try:
                # at once: the first rows may take seconds
                yield Preview([Image.new("RGB", (side, side), "white")] * count, 0.0)
                while (update := updates.get()) is not None:
                    yield update
            finally:
                stop.set()
                self._stops.pop(session, None)
            return future.result()

    def _drawn(self, images: list[Image.Image], read: str | None) -> Result:
        folder = self._new_folder()
        paths = write_pictures(folder, images)
        infos = [{str(name): value for name, value in image.info.items()} for image in images]
        return Result(paths, infos, _pack(folder / "pictures.zip", paths), read=read)

    def _new_folder(self) -> Path:
        """A new folder; those older than `KEPT_FOR` seconds are removed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.iterdir():
            if old.stat().st_mtime < time.time() - KEPT_FOR:
                shutil.rmtree(old, ignore_errors=True)  # another thread may be removing it too
        return Path(mkdtemp(dir=self._folder))


def open_upload(path: str | None) -> Image.Image:
    """The uploaded picture at `path`, RGB. Raises `Refused`."""
    if not path:
        raise Refused("no_picture")
    try:
        return open_image(Path(path), LIMITS.max_pixels)
    except ImageTooLarge as error:
        raise Refused("too_large") from error
    except CorruptImage as error:
        raise Refused("not_a_picture") from error


def read_seed(text: str) -> int | None:
    """The seed that was typed, or None for an empty field. Raises `ValueError` for anything but a whole number."""
    if not text.strip():
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"a seed is a whole number such as 7, not {text[:40]!r}") from error


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise Refused("no_prompt")


def _check_count(count: int, most: int) -> None:
    if not 1 <= count <= most:
        raise ValueError(f"from 1 to {most} at a time, not {count}")


def _record(found: SearchResult) -> dict[str, Any]:
    """What the page says of a picture that was found: its path on this machine is left out."""
    metadata = dict(found.metadata)
    if "shard" in metadata:
        metadata["shard"] = Path(str(metadata["shard"])).name
    return {"id": found.id, "score": round(found.score, 4), "metadata": metadata}


def _plain(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c == "-") else "-" for c in name)[:80]


def _pack(path: Path, files: Sequence[Path]) -> Path:
    """One file for download: the only one, or a zip of all."""
    if len(files) == 1:
        return files[0]
    with zipfile.ZipFile(path, "w") as archive:  # pictures are compressed already
        for file in files:
            archive.write(file, file.name)
    return path
