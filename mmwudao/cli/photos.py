"""What commands share about folders of pictures. Heavy imports happen inside the functions."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data.options import help_of
from data.photos.files import PhotoSettings
from mmwudao.loading.options import VectorMaker

if TYPE_CHECKING:
    from retrieval.photos.indexing import PhotoReport
    from retrieval.towers.base import Towers


@dataclasses.dataclass(frozen=True)
class Maker:
    """What makes vectors, as the user names it: a model, and which part of it."""

    model: str
    by: VectorMaker = "towers"

    def load(self, device: str, dtype: str) -> Towers:
        """See `mmwudao.loading.vectors.load_vector_maker`."""
        from mmwudao.loading.vectors import load_vector_maker

        return load_vector_maker(self.by, self.model, device, dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhotoOptions:
    """Which pictures of FOLDER are taken. Without any, a collection keeps what it was built with."""

    exclude: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help=help_of(PhotoSettings, "exclude"))] = None
    hidden: Annotated[bool, typer.Option("--hidden", help=help_of(PhotoSettings, "hidden"))] = False
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build the collection of FOLDER anew, as for another model.")
    ] = False

    @property
    def settings(self) -> PhotoSettings | None:
        """None if no option is given that says which pictures are taken."""
        return PhotoSettings(self.exclude or [], self.hidden) if self.exclude or self.hidden else None


def is_photo_folder(sources: list[str]) -> bool:
    """Whether the sources of a collection are one folder of pictures: no shards, and nothing that `embed` wrote."""
    if len(sources) != 1 or not Path(sources[0]).expanduser().is_dir():
        return False
    from retrieval.vectors.parquet import is_vectors

    folder = Path(sources[0]).expanduser()
    return not is_vectors(folder) and next(folder.glob("*.tar"), None) is None


def update_photos(
    folder: Path,
    collection: str | None,
    options: PhotoOptions,
    load_towers: Callable[[], Towers],
    maker: Maker,
    *,
    as_json: bool = False,
    quiet: bool = False,
) -> None:
    """Index the pictures of `folder`, and say what was done unless `quiet`."""
    from retrieval.collections.opening import CollectionError
    from retrieval.photos.indexing import PhotoRequest, index_photos

    if collection is not None and "://" in collection:
        raise CollectionError("the pictures of a folder are indexed on this machine: --collection is a folder")
    place = Path(collection).expanduser() if collection is not None else None
    model = maker.model
    called = str(Path(model).absolute()) if Path(model).exists() else model  # for searches from other folders
    request = PhotoRequest(folder, place, options.settings, called, options.rebuild, by=maker.by)
    report = index_photos(load_towers, request, progress=sys.stderr.isatty())
    if not quiet:
        print(json.dumps(dataclasses.asdict(report), ensure_ascii=False) if as_json else _summary(report))


def _summary(report: PhotoReport) -> str:
    changes = [
        f"{count} {name}"
        for name, count in (
            ("added", report.added),
            ("changed", report.changed),
            ("moved", report.moved),
            ("dropped", report.dropped),
        )
        if count
    ]
    lines = [f"{report.items} pictures of {report.folder}: {', '.join(changes) or 'nothing has changed'}"]
    if report.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.skipped.items())
        lines.append(f"left out: {reasons}; named in {report.log}")
    if "no reader" in report.skipped:
        lines.append("HEIC, AVIF and RAW pictures need more libraries: pip install 'mmwudao[photos]'")
    lines.append(report.collection)
    return "\n".join(lines)
