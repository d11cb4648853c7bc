"""Embeds shards: writes one Parquet file a shard, atomically, so that an interrupted run can be continued."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from data.atomic import new_file, write_file
from data.batches import Batch, encode_shards
from data.reading import ShardSpec, Skip, SkipLog, expand_shards, read_entries, shard_stem, split_name
from data.records import parse_json
from data.sample import DataError, Sample
from retrieval.towers.base import Towers
from retrieval.vectors.settings import EmbedSettings
from vqvae.storage.parts import content_hash

if TYPE_CHECKING:
    import pyarrow

FORMAT = "mmwudao-vectors/1"
GIVEN_TWICE = "id given twice in a shard"
SETTINGS = "settings.json"
MARGIN = 2  # a JPEG is decoded at a half, a quarter or an eighth where each side keeps so many times the towers' pixels
# pictures that a CPU encodes at a time: the activations of more leave its caches (bench/speed/embed_speed.py)
CPU_BATCH = 16
DEFAULTS = EmbedSettings()

logger = logging.getLogger(__name__)


@dataclass
class EmbedReport:
    """Rows of each kind in all parts, skipped samples by reason, and how many parts an earlier run left (`found`)."""

    images: int = 0
    texts: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    parts: int = 0
    found: int = 0


def embed_shards(
    towers: Towers,
    spec: ShardSpec,
    out: Path | str,
    settings: EmbedSettings = DEFAULTS,
    *,
    progress: bool = False,
) -> EmbedReport:
    """Write `out/{shard}.parquet` for every shard of `spec` (see `expand_shards`) that has no part there yet.

    A row is the vector of a picture (`kind` "image", with all captions of the sample) or of one caption (`kind`
    "text", with its `language`). `vector` is a list of `towers.embed_dim` floats of unit length. If a picture cannot
    be decoded, its whole sample is skipped, and named in the log, in the part's metadata and finally in
    `out/skipped.log`. So is the second sample of one id in a shard, and, where captions alone are embedded, a sample
    without any.

    Raises `DataError` if `out` holds other files, or vectors of other towers, shards or settings, and if there was
    nothing to embed; `out` then stays as it was.
    """
    from tqdm import tqdm

    parts = claim_parts(towers, spec, out, settings)
    pending = {shard: part for shard, part in parts.items() if not part.exists()}
    with tqdm(unit=" samples", disable=not progress) as bar:
        write_parts(towers, pending, settings, bar.update)
    return report_parts(Path(out), list(parts.values()), len(parts) - len(pending))


def claim_parts(towers: Towers, spec: ShardSpec, out: Path | str, settings: EmbedSettings) -> dict[Path, Path]:
    """Reserve the folder `out` for these towers, shards and settings; returns shard -> part. Raises `DataError`."""
    shards, out = expand_shards(spec, settings.split), Path(out)
    parts = {shard: out / f"{shard_stem(shard)}.parquet" for shard in shards}
    if len(set(parts.values())) < len(shards):
        raise DataError("two shards have the same name: embed their folders one by one")
    _claim(
        out,
        {
            "format": FORMAT,
            "towers": content_hash(towers),
            "compute": str(towers.dtype).removeprefix("torch."),
            "images": settings.images,
            "texts": settings.texts,
            "dtype": settings.dtype,
            "margin": MARGIN,
            "embed_dim": towers.embed_dim,
            "shards": {shard.name: shard.stat().st_size for shard in shards},
        },
    )
    return parts


def write_parts(
    towers: Towers,
    parts: dict[Path, Path],
    settings: EmbedSettings,
    on_sample: Callable[[], object] = lambda: None,
) -> None:
    """Write the part of each shard atomically; its content does not depend on which other shards are written."""
    log = SkipLog()
    samples: list[Sample] = []
    ids: set[str] = set()
    vectors: list[Tensor] = []
    skips: list[tuple[str, str, str]] = []
    with closing(_batches(towers, list(parts), settings)) as batches:
        for batch in batches:
            for entry in batch.entries:
                if not isinstance(entry, Skip) and entry[0].id in ids:
                    entry = Skip(GIVEN_TWICE, f"{batch.shard.name}: sample {entry[0].id}", DataError("its id is taken"))
                if isinstance(entry, Skip):
                    log.take(entry)
                    skips.append((entry.reason, entry.name, str(entry.error)))
                    continue
                sample, vector = entry
                ids.add(sample.id)
                samples.append(sample)
                vectors.append(vector)
                on_sample()
            if batch.last:
                tables = [_text_rows(towers, samples)] if settings.texts else []
                if settings.images:
                    rows = torch.stack(vectors) if vectors else torch.zeros(0, towers.embed_dim)
                    tables.insert(0, _image_rows(samples) | {"vector": rows})
                _write(parts[batch.shard], tables, towers.embed_dim, settings.dtype, skips)
                samples, ids, vectors, skips = [], set(), [], []


def _batches(towers: Towers, shards: Sequence[Path], settings: EmbedSettings) -> Generator[Batch[Tensor]]:
    """All samples of `shards` with the vectors of their pictures; without `images` no picture is opened."""

    at_once = min(settings.batch_size, CPU_BATCH) if towers.device.type == "cpu" else settings.batch_size

    def encode(pictures: list[Image.Image | Tensor]) -> Tensor:
        return towers.encode_image(towers.stack(pictures), at_once)

    if settings.images:
        yield from encode_shards(
            shards,
            lambda image, sample: towers.lighten(image),
            encode,
            batch_size=settings.batch_size,
            workers=settings.workers,
            device=towers.device,
            least_side=MARGIN * towers.image_size,
            captions=False,
        )
        return
    for shard in shards:
        entries = (e if isinstance(e, Skip) else (replace(e, image=None), torch.zeros(0)) for e in read_entries(shard))
        yield Batch(shard, list(entries), last=True)


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Create `out` with these settings, or check that it has them. Raises `DataError`."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS
    if not path.exists():
        # a run that was killed at its start leaves only a hidden file
        if any(not file.name.startswith(".") for file in out.iterdir()):
            raise DataError(f"{out} holds other files and no {SETTINGS}: choose another folder")
        write_file(path, (json.dumps(settings, indent=1) + "\n").encode())
        return
    try:
        stored = parse_json(path.read_bytes())
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
    # the pictures of one concept in several families share its captions
    distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
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
    """Write the rows of `tables` as one Parquet file, atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    text = ("id", "kind", "language", "text", "family", "concept", "base_concept", "licence", "source")
    schema = pa.schema(
        [(name, pa.string()) for name in text]
        + [("captions", pa.map_(pa.string(), pa.string())), ("vector", pa.list_(number, dim))],
        metadata={"split": split_name(path.with_suffix("")), "skipped": json.dumps(skipped)},
    )

    def column(rows: dict[str, Any], kind: pyarrow.DataType, name: str) -> pyarrow.Array:
        if name != "vector":
            return pa.array(rows[name], kind)
        return pa.FixedSizeListArray.from_arrays(pa.array(rows[name].numpy().astype(dtype).reshape(-1)), dim)

    chunks = [pa.table([column(rows, f.type, f.name) for f in schema], schema=schema) for rows in tables]
    with new_file(path) as temporary:
        pq.write_table(pa.concat_tables(chunks), temporary, compression="zstd")


def report_parts(out: Path, parts: Sequence[Path], found: int) -> EmbedReport:
    """Count the rows of all parts, write skipped.log, and remove the temporary files of killed runs.

    Raises `DataError` for no row, and then removes all that was written.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    report = EmbedReport(parts=len(parts), found=found)
    lines = []
    for stale in out.glob(".*.tmp"):
        stale.unlink(missing_ok=True)
    for part in parts:
        table = pq.read_table(part, columns=["kind"])
        images = pc.sum(pc.equal(table["kind"], "image")).as_py() or 0
        report.images += images
        report.texts += len(table) - images
        for entry in parse_json(table.schema.metadata[b"skipped"]):
            report.skipped[entry[0]] = report.skipped.get(entry[0], 0) + 1
            lines.append("\t".join(" ".join(field.split()) for field in entry) + "\n")
    if not report.images + report.texts:
        for file in (*parts, out / SETTINGS):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # other files are there
            out.rmdir()
        reasons = ", ".join(f"{reason}: {count}" for reason, count in report.skipped.items()) or "no sample"
        raise DataError(f"nothing to embed ({reasons})")
    write_file(out / "skipped.log", "".join(lines).encode("utf-8", "backslashreplace"))
    return report
