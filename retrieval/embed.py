"""Shards to vectors: one Parquet file a shard, which appears when it is whole, so that a stopped run goes on."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor

from data.images import ImageTooLarge, open_image
from data.reading import CORRUPT_IMAGE, TOO_LARGE, ShardSpec, SkipLog, expand_shards, read_shard, split_name
from data.sample import DataError, Sample
from retrieval.towers import Towers
from vqvae.hub import content_hash

if TYPE_CHECKING:
    import pyarrow

FORMAT = "mmwudao-vectors/1"
SETTINGS = "settings.json"
VECTOR_DTYPES = ("float32", "float16")
AHEAD = 4  # batches that are decoded while the towers work

logger = logging.getLogger(__name__)


@dataclass
class EmbedReport:
    """Rows by kind in all parts, skips by reason, and how many parts were there before this run."""

    images: int = 0
    texts: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    parts: int = 0
    found: int = 0


class Prepared(NamedTuple):
    """A sample and its pixels as the towers take them (None where pictures are not asked for)."""

    shard: Path
    sample: Sample | None  # None: the shard has ended
    pixels: Tensor | None


def embed_shards(
    towers: Towers,
    spec: ShardSpec,
    out: Path | str,
    *,
    split: str | None = None,
    images: bool = True,
    texts: bool = True,
    dtype: str = "float32",
    batch_size: int = 64,
    workers: int | None = None,
    progress: bool = False,
) -> EmbedReport:
    """Write `out/{shard}.parquet` for every shard of `spec` (see `expand_shards`) that has none there yet.

    A row is a vector: of a picture (`kind` "image", with all captions of the sample) or of one caption (`kind` "text",
    with its `language`); `vector` is a list of `towers.embed_dim` float32 or float16 of unit length. A picture that
    does not decode leaves out its whole sample, which is named in the log, in the part's metadata and, in the end,
    in `out/skipped.log`. `workers` threads decode while the towers work; default: one a core.

    Raises `DataError` when `out` holds something else, or vectors of other towers, shards or settings.
    """
    from tqdm import tqdm

    parts = claim_parts(towers, spec, out, split, images, texts, dtype, batch_size)
    pending = {shard: part for shard, part in parts.items() if not part.exists()}
    with tqdm(unit=" samples", disable=not progress) as bar:
        write_parts(towers, pending, images, texts, dtype, batch_size, workers, bar.update)
    return report_parts(Path(out), list(parts.values()), len(parts) - len(pending))


def claim_parts(
    towers: Towers,
    spec: ShardSpec,
    out: Path | str,
    split: str | None,
    images: bool,
    texts: bool,
    dtype: str,
    batch_size: int,
) -> dict[Path, Path]:
    """The part of each shard, in a folder that is from now on of these towers and settings. Raises `DataError`."""
    if dtype not in VECTOR_DTYPES:
        raise DataError(f"vectors are stored as {' or '.join(VECTOR_DTYPES)}, not {dtype!r}")
    if not (images or texts):
        raise DataError("nothing to embed: ask for images, texts or both")
    if batch_size < 1:
        raise DataError(f"a batch holds at least one picture, not {batch_size}")
    shards, out = expand_shards(spec, split), Path(out)
    parts = {shard: out / f"{shard.stem}.parquet" for shard in shards}
    if len(set(parts.values())) < len(shards):
        raise DataError("two shards have the same name: embed their folders one by one")
    _claim(
        out,
        {
            "format": FORMAT,
            "towers": content_hash(towers),
            "compute": str(towers.dtype).removeprefix("torch."),
            "images": images,
            "texts": texts,
            "dtype": dtype,
            "embed_dim": towers.embed_dim,
            "shards": {shard.name: shard.stat().st_size for shard in shards},
        },
    )
    return parts


def write_parts(
    towers: Towers,
    parts: dict[Path, Path],
    images: bool,
    texts: bool,
    dtype: str,
    batch_size: int,
    workers: int | None,
    on_sample: Callable[[], object] = lambda: None,
) -> None:
    """Write the part of each shard, atomically; in it is the same whichever shards are written together."""
    skips: dict[Path, list[tuple[str, str, str]]] = {shard: [] for shard in parts}
    samples: list[Sample] = []
    batch: list[Tensor] = []
    vectors: list[Tensor] = []
    with ThreadPoolExecutor(workers or _cores()) as pool:
        for shard, sample, pixels in prepare(towers if images else None, list(parts), pool, AHEAD * batch_size, skips):
            if sample is not None:
                samples.append(sample)
                on_sample()
            if pixels is not None:
                batch.append(pixels)
            if batch and (sample is None or len(batch) == batch_size):
                vectors.append(towers.encode_image(torch.stack(batch), batch_size))
                batch = []
            if sample is None:
                tables = [_text_rows(towers, samples)] if texts else []
                if images:
                    tables.insert(0, _image_rows(samples))
                    tables[0]["vector"] = torch.cat([torch.zeros(0, towers.embed_dim), *vectors])
                _write(parts[shard], tables, towers.embed_dim, dtype, skips[shard])
                samples, vectors = [], []


def prepare(
    towers: Towers | None,
    shards: Sequence[Path],
    pool: ThreadPoolExecutor,
    ahead: int,
    skips: dict[Path, list[tuple[str, str, str]]],
) -> Iterator[Prepared]:
    """The samples of `shards` in order, `ahead` of them decoded in `pool` before they are asked for.

    Without `towers` pictures stay as they are. What is skipped goes to `skips` of its shard.
    """
    log = SkipLog()

    def decode(sample: Sample) -> Tensor:
        assert towers is not None
        return towers.preprocess(open_image(sample.image))

    def skip(shard: Path, reason: str, name: str, error: Exception) -> None:
        log.add(reason, name, str(error))
        skips[shard].append((reason, name, str(error)))

    def read() -> Iterator[tuple[Path, Sample | None, Future[Tensor] | None]]:
        for shard in shards:
            for sample in read_shard(shard, partial(skip, shard)):
                yield shard, sample, pool.submit(decode, sample) if towers is not None else None
            yield shard, None, None

    def settle(shard: Path, sample: Sample | None, future: Future[Tensor] | None) -> Iterator[Prepared]:
        try:
            yield Prepared(shard, sample, future.result() if future is not None else None)
        except DataError as error:
            assert sample is not None
            reason = TOO_LARGE if isinstance(error, ImageTooLarge) else CORRUPT_IMAGE
            skip(shard, reason, f"{shard.name}: sample {sample.id}", error)

    window: deque[tuple[Path, Sample | None, Future[Tensor] | None]] = deque()
    for entry in read():
        window.append(entry)
        if len(window) > ahead:
            yield from settle(*window.popleft())
    while window:
        yield from settle(*window.popleft())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Make `out` the folder of these settings, or see that it is. Raises `DataError`."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS
    if not path.exists():
        # a run that was killed at once leaves nothing but a hidden file
        if any(not file.name.startswith(".") for file in out.iterdir()):
            raise DataError(f"{out} holds other files and no {SETTINGS}: choose another folder")
        _replace(path, (json.dumps(settings, indent=1) + "\n").encode())
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON; choose another folder") from error
    if not isinstance(stored, dict):
        stored = {}
    names = [name for name in settings if stored.get(name) != settings[name]]
    if names:
        raise DataError(f"{out} holds vectors of other settings ({', '.join(names)} differ): choose another folder")


def _image_rows(samples: Sequence[Sample]) -> dict[str, Any]:
    return _columns(samples) | {
        "kind": ["image"] * len(samples),
        "language": [None] * len(samples),
        "text": [None] * len(samples),
        "captions": [[(name, c.name) for name, c in sorted(sample.captions.items())] for sample in samples],
    }


def _text_rows(towers: Towers, samples: Sequence[Sample]) -> dict[str, Any]:
    rows = [(sample, language) for sample in samples for language in sorted(sample.captions)]
    texts = [sample.captions[language].name for sample, language in rows]
    # the families of a concept share its captions
    distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    vectors = towers.encode_text(list(distinct))
    return _columns([sample for sample, _ in rows]) | {
        "kind": ["text"] * len(rows),
        "language": [language for _, language in rows],
        "text": texts,
        "captions": [None] * len(rows),
        "vector": vectors[[distinct[text] for text in texts]],
    }


def _columns(samples: Sequence[Sample]) -> dict[str, Any]:
    names = ("id", "family", "concept", "base_concept", "licence", "source")
    return {name: [getattr(sample, name) for sample in samples] for name in names}


def _write(path: Path, tables: list[dict[str, Any]], dim: int, dtype: str, skipped: list[tuple[str, str, str]]) -> None:
    """One Parquet file of the rows of `tables`, atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    text = ("id", "kind", "language", "text", "family", "concept", "base_concept", "licence", "source")
    schema = pa.schema(
        [(name, pa.string()) for name in text]
        + [("captions", pa.map_(pa.string(), pa.string())), ("vector", pa.list_(number, dim))],
        metadata={"split": split_name(path.with_suffix(".tar")), "skipped": json.dumps(skipped)},
    )

    def column(rows: dict[str, Any], kind: pyarrow.DataType, name: str) -> pyarrow.Array:
        if name != "vector":
            return pa.array(rows[name], kind)
        return pa.FixedSizeListArray.from_arrays(pa.array(rows[name].numpy().astype(dtype).reshape(-1)), dim)

    chunks = [pa.table([column(rows, f.type, f.name) for f in schema], schema=schema) for rows in tables]
    # a name of its own: what a lost machine still writes must not get into the file of who took over its shard
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    pq.write_table(pa.concat_tables(chunks), temporary, compression="zstd")
    os.replace(temporary, path)


def report_parts(out: Path, parts: Sequence[Path], found: int) -> EmbedReport:
    """Count the rows of all parts, write the log of what they skipped, and remove what kills left of them."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    report = EmbedReport(parts=len(parts), found=found)
    lines = []
    for left in out.glob(".*.parquet.*.tmp"):
        left.unlink(missing_ok=True)
    for part in parts:
        table = pq.read_table(part, columns=["kind"])
        images = pc.sum(pc.equal(table["kind"], "image")).as_py() or 0
        report.images += images
        report.texts += len(table) - images
        for entry in json.loads(table.schema.metadata[b"skipped"]):
            report.skipped[entry[0]] = report.skipped.get(entry[0], 0) + 1
            lines.append("\t".join(" ".join(field.split()) for field in entry) + "\n")
    _replace(out / "skipped.log", "".join(lines).encode("utf-8", "backslashreplace"))
    return report


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
