"""Shards to decoded pictures with captions, through webdataset's own pieces; damage is counted and named, not fatal."""

from __future__ import annotations

import functools
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import webdataset as wds
from PIL import Image
from webdataset.tariterators import base_plus_ext, tarfile_samples
from webdataset.utils import make_seed, pytorch_worker_info

from data.archives import DAMAGE, PlainSample, archive_problem, is_of_macos, lacks_extension, plain_samples, read_plain
from data.images import MAX_PIXELS, ImageTooLarge, open_image
from data.sample import IMAGE_EXTENSIONS, DataError, DoubledMember, Needed, Sample

logger = logging.getLogger(__name__)

ShardSpec = str | Path | Sequence[str | Path]

MISSING_PICTURE = "missing picture"
MISSING_CAPTION = "missing or broken caption"
CORRUPT_IMAGE = "corrupt image"
TOO_LARGE = "picture too large"
DOUBLED_MEMBER = "two pictures or captions in one sample"
NO_EXTENSION = "file without an extension"
BROKEN_SHARD = "truncated or broken shard"
NO_IMAGE_MEMBER = f"no member ends in {', '.join(IMAGE_EXTENSIONS)}"

# a resampling dataset has no end: it gives up after this many pictures in a row that do not decode
MAX_FAILURES = 10_000

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_SHARD_NAME = re.compile(r"(?P<split>train|val|valid|validation|test(-[a-z]+)?)-\d+")


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
    shards = sorted(path for path in folder.iterdir() if is_tar(path) and not path.name.startswith("."))
    if not shards:
        raise DataError(f"{folder} holds no .tar shard; make shards with `mmwudao data build` or `mmwudao data pack`")
    if split is None:
        return shards
    chosen = [shard for shard in shards if re.fullmatch(rf"{re.escape(split)}-\d+", shard_stem(shard))]
    splits = {split_name(shard) for shard in shards}
    if not chosen and split == "train" and splits == {"train"}:
        return shards
    if not chosen:
        raise DataError(f"{folder} holds no {split} shard; its splits: {', '.join(sorted(splits))}")
    return chosen


def is_tar(path: Path) -> bool:
    """Whether a file has the name of a tar file, compressed or not."""
    return path.name.lower().endswith(TAR_SUFFIXES) and path.is_file()


def shard_stem(shard: Path) -> str:
    """The name of a shard without the suffix of a tar file: `pictures.v1` of pictures.v1.tar or .tar.gz."""
    suffix = next((suffix for suffix in TAR_SUFFIXES if shard.name.lower().endswith(suffix)), "")
    return shard.name[: len(shard.name) - len(suffix)]


def split_name(shard: Path) -> str:
    """The split that a shard's file name tells; `train` for one that tells none."""
    match = _SHARD_NAME.fullmatch(shard_stem(shard))
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
    captions: bool = True,
) -> ShardDataset:
    """The examples of `split` in the shards of `spec` (see `expand_shards`), as an iterable dataset.

    `shuffle` is the size of the shuffle buffer in encoded samples; 0 keeps the order of the shards. `resampled` draws
    shards with replacement, without end, another draw for each node. `by_node=False` gives every node of a
    distributed run the same examples (an evaluation set, say) instead of its share. `strict` raises `DataError` at
    the first sample that would be skipped. `max_pixels` caps width x height. `log` takes the skips. Pictures without a
    caption are skipped unless `captions` is false.
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
        captions=captions,
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
        captions: bool = True,
    ) -> None:
        if shuffle < 0:
            raise DataError(f"the shuffle buffer holds 0 samples or more, not {shuffle}")
        self.shards = list(shards)
        self.shuffle, self.seed, self.resampled, self.by_node = shuffle, seed, resampled, by_node
        self.strict, self.max_pixels, self.captions = strict, max_pixels, captions
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
            for sample in read_shard(shard, self._skip, self.captions):
                fruitless = 0
                yield shard.name, sample
            # drawn with replacement, this many shards are all of them but for one chance in 20,000
            if self.resampled and fruitless > 10 * len(self.shards):
                raise DataError(f"no readable sample in {len(self.shards)} shards, such as {shard}")

    def _skip(self, reason: str, name: str, error: Exception) -> None:
        self.log.take(Skip(reason, name, error), self.strict)


def read_shard(shard: Path, skip: Callable[[str, str, Exception], None], captions: Needed = True) -> Iterator[Sample]:
    """The samples of one tar file, pictures still encoded. Problems go to `skip(reason, name, error)`.

    A sample without a caption is a problem unless `captions` is false, or questions will do. A shard cut short gives
    the samples before the cut and is reported once, even when it ends between two members: `tarfile` sees no cut there.
    """
    problems: list[Exception] = []
    doubled: dict[str, str] = {}
    causes = MemberCauses(shard)
    left_out: list[str] = []
    plain = plain_samples(shard, left_out)
    if plain is None:
        left_out.clear()
        found = _any_samples(shard, problems, doubled, left_out)
    else:
        found = _plain_samples(shard, plain, problems)
    for key, content in found:
        name = f"{shard.name}: sample {key}"
        if (member := doubled.pop(key, None)) is not None:
            skip(DOUBLED_MEMBER, name, DoubledMember(f"sample {key}: {member} is twice in the shard: leave one out"))
            continue
        if not any(extension in content for extension in IMAGE_EXTENSIONS):
            skip(MISSING_PICTURE, name, DataError(causes.of(key, content) or NO_IMAGE_MEMBER))
            continue
        try:
            sample = Sample.from_members(key, content)
            if captions is True or (captions and not sample.questions):
                sample.require_captions()
        except DoubledMember as error:
            skip(DOUBLED_MEMBER, name, error)
            continue
        except DataError as error:
            cause = causes.of(key, content) if not content.keys() & {"txt", "json"} else None
            skip(MISSING_CAPTION, name, DataError(cause) if cause else error)
            continue
        yield sample
    for member in left_out:
        skip(NO_EXTENSION, f"{shard.name}: {member}", DataError("it is of no sample: its name does not end in .KIND"))
    if (plain is None or problems) and (problem := archive_problem(shard, problems)) is not None:
        skip(BROKEN_SHARD, str(shard), DataError(problem))


def _plain_samples(
    shard: Path, samples: list[PlainSample], problems: list[Exception]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of the samples of a plain shard, in a third of the time that webdataset takes."""
    try:
        yield from read_plain(shard, samples)
    except OSError as error:
        problems.append(error)


def _any_samples(
    shard: Path, problems: list[Exception], doubled: dict[str, str], left_out: list[str]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of the samples that webdataset finds, and what came up.

    `doubled` gets key -> a member given twice, before the sample is given out; `left_out` members of no sample.
    """

    def note(error: Exception) -> bool:
        member, twice, _ = str(error.args[0] if error.args else "").partition(": duplicate file name in tar file")
        key = base_plus_ext(member)[0]
        if twice and key is not None:
            doubled[key] = member
        else:
            problems.append(error)
        return True  # webdataset then goes on with the next member, if it can

    def select(name: str) -> bool:
        left_out.extend([name] * lacks_extension(name))
        return not is_of_macos(name)

    for members in tarfile_samples([{"url": str(shard.absolute())}], handler=note, select_files=select):
        yield members["__key__"], {name: value for name, value in members.items() if not name.startswith("__")}


def read_entries(shard: Path, captions: Needed = True) -> Iterator[Sample | Skip]:
    """The samples of `read_shard`, and in its place among them what is wrong with the others."""
    skips: list[Skip] = []
    for sample in read_shard(shard, lambda *skip: skips.append(Skip(*skip)), captions):
        yield from skips
        skips.clear()
        yield sample
    yield from skips


class MemberCauses:
    """Why a sample of a shard lacks a member, by the names in the whole shard, which are read when first asked for."""

    def __init__(self, shard: Path) -> None:
        self.shard = shard

    def of(self, key: str, found: Container[str]) -> str | None:
        """What is wrong with the members of `key`, of which those with the extensions `found` were read together."""
        members = self._members.get(key, {})
        if link := next((name for name, regular in members.items() if not regular), None):
            return f"its {link} is a link: make the shard with `tar --dereference --hard-dereference`"
        if apart := [name for name in members if name not in found]:
            return f"its {apart[0]} lies apart from it in the shard: make the shard with `tar --sort=name`"
        dotted = next((name for name in members if name.rpartition(".")[2] in IMAGE_EXTENSIONS and "." in name), None)
        if dotted:
            return f"the name of a sample ends at its first dot, so that its picture is called {dotted!r}: rename it"
        return None

    @functools.cached_property
    def _members(self) -> dict[str, dict[str, bool]]:
        """Key -> extension -> whether it is a file; links and what stands behind a damaged place are no files."""
        members: dict[str, dict[str, bool]] = {}
        with suppress(*DAMAGE), tarfile.open(self.shard) as archive:
            for entry in archive:
                key, extension = base_plus_ext(entry.name)
                if key is not None and not entry.isdir():
                    members.setdefault(key, {})[extension.lower()] = entry.isreg()
        return members
