"""Shards to decoded pictures with captions, through webdataset's own pieces; damage is counted and named, not fatal."""

from __future__ import annotations

import logging
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import webdataset as wds
from PIL import Image
from webdataset.tariterators import tarfile_samples
from webdataset.utils import make_seed, pytorch_worker_info

from data.images import MAX_PIXELS, ImageTooLarge, open_image
from data.sample import IMAGE_EXTENSIONS, DataError, Sample

logger = logging.getLogger(__name__)

ShardSpec = str | Path | Sequence[str | Path]

MISSING_PICTURE = "missing picture"
MISSING_CAPTION = "missing or broken caption"
CORRUPT_IMAGE = "corrupt image"
TOO_LARGE = "picture too large"
BROKEN_SHARD = "truncated or broken shard"

# a resampling dataset has no end: it gives up after this many pictures in a row that do not decode
MAX_FAILURES = 10_000

_SHARD_NAME = re.compile(r"(?P<split>train|val|valid|validation|test(-[a-z]+)?)-\d+\.tar")


class Example(NamedTuple):
    """One training example: the sample as stored, and its picture decoded to RGB."""

    sample: Sample
    image: Image.Image


class Skip(NamedTuple):
    """A sample or shard that cannot be used: the reason it is counted under, its name, and the error."""

    reason: str
    name: str
    error: Exception


class SkipLog:
    """Counts what was skipped, by reason, and names each: in `logging` (a few a reason) and, with `path`, in a file.

    The file takes one line a skip, `reason<TAB>name<TAB>problem`, appended by every process that reads, so `counts`
    then covers all DataLoader workers; without it, `counts` covers the calling process alone.
    """

    def __init__(self, path: Path | str | None = None, warnings: int = 10) -> None:
        """`warnings`: how many skips of each reason are logged one by one in each process.

        Raises `DataError` when `path` cannot be written.
        """
        self.path = Path(path) if path is not None else None
        self.warnings = warnings
        self._counts: Counter[str] = Counter()
        self._start = 0
        if self.path is not None:
            try:  # now, not at the first skip hours into a training
                with self.path.open("ab") as file:
                    self._start = file.tell()  # a resumed run appends, and counts its own part
            except OSError as error:
                raise DataError(f"cannot write the log of skipped samples {self.path}: {error.strerror}") from error

    def add(self, reason: str, name: str, problem: str) -> None:
        """Count and name one skip."""
        self._counts[reason] += 1
        if self._counts[reason] <= self.warnings:
            logger.warning("skipped %s: %s: %s", name, reason, problem)
            if self._counts[reason] == self.warnings:
                logger.warning("more of %r are counted, and no longer logged one by one", reason)
        if self.path is not None:
            line = "\t".join(" ".join(part.split()) for part in (reason, name, problem)) + "\n"
            # one short unbuffered append a skip, so that lines of several processes do not mix
            with self.path.open("ab", buffering=0) as file:
                file.write(line.encode("utf-8", "backslashreplace"))

    def take(self, skip: Skip, strict: bool = False) -> None:
        """Count and name one skip, or with `strict` raise it as `DataError`."""
        if strict:
            raise DataError(f"{skip.name}: {skip.error}") from skip.error
        self.add(skip.reason, skip.name, str(skip.error))

    @property
    def counts(self) -> dict[str, int]:
        """Reason -> how many, sorted by reason."""
        counts = self._counts
        if self.path is not None:
            with self.path.open("rb") as file:
                file.seek(self._start)
                counts = Counter(line.split(b"\t", 1)[0].decode() for line in file)
        return dict(sorted(counts.items()))


def expand_shards(spec: ShardSpec, split: str | None = None) -> list[Path]:
    """The tar files of a folder, a file, a brace pattern (`train-{00000..00009}.tar`) or a list of these, in order.

    `split` picks the `{split}-00000.tar`, ... of a folder; where the names tell of no split, as img2dataset's, all
    shards are `train`. Raises `DataError` when there is no shard, or one named does not exist.
    """
    import braceexpand

    if not isinstance(spec, (str, Path)):
        shards = [shard for part in spec for shard in expand_shards(part, split)]
        if not shards:
            raise DataError("the list of shards is empty")
        return shards
    if Path(spec).is_dir():
        return _folder_shards(Path(spec), split)
    if Path(spec).is_file():
        return [Path(spec)]
    try:
        names = list(braceexpand.braceexpand(str(spec)))
    except ValueError as error:
        raise DataError(f"unbalanced braces in the shard pattern {spec}") from error
    if len(names) > 1:
        return [shard for name in names for shard in expand_shards(name, split)]
    raise DataError(f"no shard or folder of shards at {names[0] if names else spec}")


def _folder_shards(folder: Path, split: str | None) -> list[Path]:
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise DataError(f"{folder} holds no .tar shard; make shards with `mmwudao data build` or `mmwudao data pack`")
    if split is None:
        return shards
    chosen = [shard for shard in shards if re.fullmatch(rf"{re.escape(split)}-\d+\.tar", shard.name)]
    splits = {split_name(shard) for shard in shards}
    if not chosen and split == "train" and splits == {"train"}:
        return shards
    if not chosen:
        raise DataError(f"{folder} holds no {split} shard; its splits: {', '.join(sorted(splits))}")
    return chosen


def split_name(shard: Path) -> str:
    """The split that a shard's file name tells; `train` for one that tells none."""
    match = _SHARD_NAME.fullmatch(shard.name)
    return match["split"] if match else "train"


def open_shards(
    spec: ShardSpec,
    split: str = "train",
    *,
    shuffle: int = 0,
    seed: int = 0,
    resampled: bool = False,
    by_node: bool = True,
    strict: bool = False,
    max_pixels: int = MAX_PIXELS,
    log: SkipLog | None = None,
) -> ShardDataset:
    """The examples of `split` in the shards of `spec` (see `expand_shards`), as an iterable dataset.

    `shuffle` is the size of the shuffle buffer in encoded samples; 0 keeps the order of the shards. `resampled` draws
    shards with replacement, without end, another draw for each node. `by_node=False` gives every node of a
    distributed run the same examples (an evaluation set, say) instead of its share. `strict` raises `DataError` at
    the first sample that would be skipped. `max_pixels` caps width x height. `log` takes the skips.
    """
    return ShardDataset(
        expand_shards(spec, split),
        shuffle=shuffle,
        seed=seed,
        resampled=resampled,
        by_node=by_node,
        strict=strict,
        max_pixels=max_pixels,
        log=log,
    )


class ShardDataset(torch.utils.data.IterableDataset[Example]):
    """Yields `Example`s, split by node and by DataLoader worker; see `open_shards`.

    The order depends on `seed`, the epoch, the node and the worker alone: call `set_epoch` for another order.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        shuffle: int = 0,
        seed: int = 0,
        resampled: bool = False,
        by_node: bool = True,
        strict: bool = False,
        max_pixels: int = MAX_PIXELS,
        log: SkipLog | None = None,
    ) -> None:
        if shuffle < 0:
            raise DataError(f"the shuffle buffer holds 0 samples or more, not {shuffle}")
        self.shards = list(shards)
        self.shuffle, self.seed, self.resampled, self.by_node = shuffle, seed, resampled, by_node
        self.strict, self.max_pixels = strict, max_pixels
        self.log = log if log is not None else SkipLog()
        # in shared memory, so that `set_epoch` reaches the persistent workers of a DataLoader
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the order that the next iteration reads in."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Example]:
        rank, nodes, worker, _ = pytorch_worker_info()
        if not self.by_node:
            rank, nodes = 0, 1
        seed = make_seed(self.seed, int(self._epoch))  # the same on every node: they share out one order of shards
        urls = [str(shard.absolute()) for shard in self.shards]  # absolute, so that no name reads as "scheme:..."
        if self.resampled:
            draw = make_seed(rank, worker)
            stages = [wds.ResampledShards(urls, seed=seed, worker_seed=lambda: draw, deterministic=True)]
        elif nodes > len(urls):
            raise DataError(f"{len(urls)} shards cannot feed {nodes} processes; make smaller shards or resample them")
        else:
            shard_list = wds.SimpleShardList(urls, seed=seed if self.shuffle else None)
            stages = [shard_list, wds.split_by_node if self.by_node else None, wds.split_by_worker]
        stages.append(self._read)
        if self.shuffle:
            stages.append(wds.shuffle(self.shuffle, initial=self.shuffle, seed=make_seed(seed, rank, worker)))
        failures = 0
        for shard, sample in wds.DataPipeline(*stages):
            try:
                image = open_image(sample.require_image(), self.max_pixels)
            except DataError as error:
                failures += 1
                if self.resampled and failures == MAX_FAILURES:
                    raise DataError(f"{failures} pictures in a row cannot be used; the last: {error}") from error
                reason = TOO_LARGE if isinstance(error, ImageTooLarge) else CORRUPT_IMAGE
                self._skip(reason, f"{shard}: sample {sample.id}", error)
                continue
            failures = 0
            yield Example(sample, image)

    def _read(self, sources: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Sample]]:
        """Sources -> (name of the shard, sample)."""
        fruitless = 0
        for source in sources:
            shard = Path(source["url"])
            fruitless += 1
            for sample in read_shard(shard, self._skip):
                fruitless = 0
                yield shard.name, sample
            # drawn with replacement, this many shards are all of them but for one chance in 20,000
            if self.resampled and fruitless > 10 * len(self.shards):
                raise DataError(f"no readable sample in {len(self.shards)} shards, such as {shard}")

    def _skip(self, reason: str, name: str, error: Exception) -> None:
        self.log.take(Skip(reason, name, error), self.strict)


def read_shard(shard: Path, skip: Callable[[str, str, Exception], None]) -> Iterator[Sample]:
    """The samples of one tar file, pictures still encoded. Problems go to `skip(reason, name, error)`.

    A shard cut short gives every sample before the cut and is reported once, even when it ends between two members,
    which `tarfile` takes for a proper end.
    """
    problems: list[Exception] = []

    def note(error: Exception) -> bool:
        problems.append(error)
        return True  # webdataset then goes on with the next member, if it can

    for members in tarfile_samples([{"url": str(shard)}], handler=note):
        key = members["__key__"]
        content = {name: value for name, value in members.items() if not name.startswith("__")}
        name = f"{shard.name}: sample {key}"
        if not any(extension in content for extension in IMAGE_EXTENSIONS):
            skip(MISSING_PICTURE, name, DataError(f"no member ends in {', '.join(IMAGE_EXTENSIONS)}"))
            continue
        try:
            sample = Sample.from_members(key, content)
            sample.require_captions()
        except DataError as error:
            skip(MISSING_CAPTION, name, error)
            continue
        yield sample
    problem = _message(problems[0]) if problems else _early_end(shard)
    if problem is not None:
        skip(BROKEN_SHARD, str(shard), DataError(problem))


def read_entries(shard: Path) -> Iterator[Sample | Skip]:
    """The samples of `read_shard`, and in its place among them what is wrong with the others."""
    skips: list[Skip] = []
    for sample in read_shard(shard, lambda *skip: skips.append(Skip(*skip))):
        yield from skips
        skips.clear()
        yield sample
    yield from skips


def _message(error: Exception) -> str:
    # webdataset appends the stream to the arguments of an exception; the first is the message
    text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    return text.partition(" @ ")[0]


def _early_end(shard: Path) -> str | None:
    """What is wrong with an archive that `tarfile` reads without complaint, or None.

    `tarfile` takes a damaged header, or a file cut inside one, for the end; the true end is a block of zeros.
    """
    try:
        with tarfile.open(shard) as archive:
            archive.getmembers()  # reads the headers only
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE):
                return None
            return f"the archive breaks off at byte {archive.offset}"
    except (tarfile.TarError, OSError, EOFError) as error:
        return str(error)
