"""`mmwudao data clean`: two passes over shards or texts, the first to judge everything, the second to write what stays.

What stays depends on what the samples are, not on their order. Every text, picture and sample that goes is counted and
named in `skipped.log`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from data.atomic import new_folder, write_file
from data.characters import encoding_of, is_blank, is_unicode
from data.clean.config import CleanConfig, text_filters
from data.clean.fit import FitScore, worst_fits
from data.clean.judged import Dropped, TextFilter, filter_captions
from data.clean.near_texts import near_texts
from data.clean.privacy import PrivacyFilter
from data.clean.unfinished import Judged, Key, UnfinishedRun
from data.fingerprints import Fingerprints, Named, fingerprint, near_pairs, stacked
from data.images import open_image
from data.reading import CORRUPT_IMAGE, ShardSpec, SkipLog, expand_shards, read_shard, split_name
from data.recipes.splits import stable_hash
from data.records import parse_json
from data.sample import UNKNOWN_LANGUAGE, Caption, DataError, Sample, is_language, language_code
from data.shards import Manifest, ShardWriter, write_manifest
from data.styles import LANGUAGES

logger = logging.getLogger(__name__)

SKIP_LOG = "skipped.log"
NO_CAPTION = "no caption left"
NEAR_PICTURE = "near copy of another picture"
NEAR_TEXT = "near copy of another text"
BROKEN_LINE = "broken line"
BAD_FIT = "caption fits its picture least"
TEXT_FILES = (".txt", ".jsonl", ".ndjson")
_BATCH = 32


@dataclass
class CleanReport:
    """How many samples were read and written, and what went, by reason (of texts, pictures and samples)."""

    read: int = 0
    written: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


def clean_data(
    source: ShardSpec,
    out: Path,
    config: CleanConfig | None = None,
    score: FitScore | None = None,
    judge: str = "",
) -> CleanReport:
    """Clean shards, or texts (`.txt` with one a line, `.jsonl` of {"text", "language"}), into the new folder `out`.

    Shards keep their splits; texts become files of the same names. `score` judges whether captions fit pictures;
    without it that filter is off; `judge` names it. A run that is interrupted or killed leaves in `out` what it has
    judged, and the same run goes on from there. Raises `DataError` for an `out` in use, or nothing to read.
    """
    config, out = config or CleanConfig(), Path(out)
    unfinished = UnfinishedRun(out, {**asdict(config), "judge": judge})
    texts = _text_files(source)
    paths = texts or expand_shards(source)
    try:
        judged = _judge(paths, config, score if config.fit.on else None, unfinished)
        with new_folder(out, replace=True) as building:
            log = SkipLog(building / SKIP_LOG)
            for told in judged.told:
                log.add(*told)
            _leave_out_copies(judged, config, log)
            _leave_out_misfits(judged, config, log)
            write = _write_texts if texts else _write_shards
            report = CleanReport(len(judged.keys), write(building, paths, judged, log))
            report.skipped = log.counts
            if not report.written:
                reasons = ", ".join(f"{reason}: {count}" for reason, count in report.skipped.items()) or "no sample"
                raise DataError(f"nothing is left to write ({reasons})")
            if not texts:
                _add_counts(building, log)
    except Exception:  # not when it is interrupted: then it can go on
        unfinished.remove()
        raise
    return report


def _judge(paths: Sequence[Path], config: CleanConfig, score: FitScore | None, unfinished: UnfinishedRun) -> Judged:
    """The first pass: what an unfinished run has found of each shard, or else what is found now."""
    filters = text_filters(config)
    whole = Judged()
    known = 0
    for path in paths:
        judged = unfinished.read(path)
        if judged is None:
            judged = _judge_shard(path, config, filters, score)
            unfinished.write(path, judged)
        else:
            known += 1
        whole.add(judged)
    if known:
        logger.warning("%d of %d were judged by a run that did not end: went on from there", known, len(paths))
    return whole


def _judge_shard(path: Path, config: CleanConfig, filters: list[TextFilter], score: FitScore | None) -> Judged:
    """The filters of texts on every sample of a shard or text file, and what the other filters compare."""
    judged = Judged()
    waiting: list[tuple[Key, Sample]] = []
    for sample in _samples(path, judged):
        key = (str(path), sample.id)
        kept = filter_captions(sample, filters, lambda dropped, key=key: _note(judged, key, dropped))  # type: ignore[misc]
        if not kept.captions:
            judged.told.append((NO_CAPTION, _name(key), "every caption was dropped"))
            judged.gone.add(key)
        elif kept.captions != sample.captions:
            judged.captions[key] = kept.captions
        judged.keys.append(key)
        content = sample.image if sample.image is not None else repr(sorted(sample.captions.items())).encode()
        judged.ranks.append((split_name(path) == "train", stable_hash(content.hex() + sample.id)))
        if config.near_texts.on:
            language, caption = next(iter(sample.captions.items()))
            judged.texts.append((language, caption.name))
        if sample.image is not None and (config.near_pictures.on or score):
            try:
                picture = open_image(sample.image)
            except DataError as error:
                judged.told.append((CORRUPT_IMAGE, _name(key), str(error)))
                judged.gone.add(key)
                judged.prints.append((0, None))
                continue
            judged.prints.append(fingerprint(picture) if config.near_pictures.on else (0, None))
            if score and kept.captions:
                waiting.append((key, kept))
        if score and len(waiting) >= _BATCH:
            _score(waiting, score, judged)
    if score:
        _score(waiting, score, judged)
    return judged


def _score(waiting: list[tuple[Key, Sample]], score: FitScore, judged: Judged) -> None:
    """Score the captions of the waiting samples, and forget the samples."""
    pairs = [(key, sample, language) for key, sample in waiting for language in sorted(sample.captions)]
    pictures = {key: open_image(sample.require_image()) for key, sample in waiting}
    if pairs:
        cosines = score(
            [pictures[key] for key, _, _ in pairs], [sample.captions[language].name for _, sample, language in pairs]
        )
        judged.scores += [
            (key, language, float(cosine)) for (key, _, language), cosine in zip(pairs, cosines, strict=True)
        ]
    waiting.clear()


def _leave_out_copies(judged: Judged, config: CleanConfig, log: SkipLog) -> None:
    """Of samples that are near copies, keep the first by rank."""
    if config.near_pictures.on and judged.prints:
        names = [Named(key[1], "", "", key[0]) for key in judged.keys]
        usable = [number for number, (_, small) in enumerate(judged.prints) if small is not None]
        prints: Fingerprints = stacked([names[n] for n in usable], [judged.prints[n] for n in usable])  # type: ignore[misc]
        pairs = [(usable[a], usable[b]) for a, b, _, _ in near_pairs(prints, prints, config.near_pictures) if a != b]
        _keep_first(judged, pairs, NEAR_PICTURE, log)
    if config.near_texts.on:
        _keep_first(judged, near_texts(judged.texts, config.near_texts), NEAR_TEXT, log)


def _keep_first(judged: Judged, pairs: Iterable[tuple[int, int]], reason: str, log: SkipLog) -> None:
    near: dict[int, set[int]] = {}
    for one, other in pairs:
        near.setdefault(one, set()).add(other)
        near.setdefault(other, set()).add(one)
    kept: set[int] = set()
    for number in sorted(near, key=lambda number: judged.ranks[number]):
        key = judged.keys[number]
        if key in judged.gone:
            continue
        copied = min(near[number] & kept, default=None)
        if copied is None:
            kept.add(number)
        else:
            log.add(reason, _name(key), f"of {_name(judged.keys[copied])}")
            judged.gone.add(key)


def _leave_out_misfits(judged: Judged, config: CleanConfig, log: SkipLog) -> None:
    """Drop the captions that fit least; a sample without one goes."""
    worst = worst_fits([(language, cosine) for _, language, cosine in judged.scores], config.fit.share)
    dropped: dict[Key, set[str]] = {}
    for number in sorted(worst):
        key, language, cosine = judged.scores[number]
        log.add(BAD_FIT, f"{_name(key)} ({language})", f"cosine {cosine:.3f}")
        dropped.setdefault(key, set()).add(language)
    languages: dict[Key, set[str]] = {}
    for key, language, _ in judged.scores:
        languages.setdefault(key, set()).add(language)
    for key, found in dropped.items():
        if found == languages[key]:
            log.add(NO_CAPTION, _name(key), "no caption fits")
            judged.gone.add(key)
    judged.scores = [entry for entry in judged.scores if entry[1] in dropped.get(entry[0], ())]


def _kept(paths: Sequence[Path], judged: Judged) -> Iterator[tuple[Path, Sample]]:
    """The second pass: the samples that stay, with the captions that stay."""
    misfits: dict[Key, set[str]] = {}
    for key, language, _ in judged.scores:
        misfits.setdefault(key, set()).add(language)
    for path in paths:
        for sample in _samples(path, Judged()):  # what cannot be read was told by the first pass
            key = (str(path), sample.id)
            if key not in judged.gone:
                captions: Mapping[str, Caption] = judged.captions.get(key, sample.captions)
                kept = {name: caption for name, caption in captions.items() if name not in misfits.get(key, ())}
                yield path, replace(sample, captions=kept)


def _write_shards(folder: Path, paths: Sequence[Path], judged: Judged, log: SkipLog) -> int:
    splits = sorted({split_name(path) for path in paths}, key=lambda split: (split != "train", split))
    with ExitStack() as stack:
        writers = {split: stack.enter_context(ShardWriter(folder, split)) for split in splits}
        for path, sample in _kept(paths, judged):
            writers[split_name(path)].write(sample)
    manifest = Manifest("cleaned", None, {split: writer.shards for split, writer in writers.items()})
    write_manifest(folder, manifest)
    return sum(manifest.samples(split) for split in splits)


def _add_counts(folder: Path, log: SkipLog) -> None:
    from data.shards import read_manifest

    manifest = read_manifest(folder)
    manifest.skipped = log.counts
    write_manifest(folder, manifest)


def _write_texts(folder: Path, paths: Sequence[Path], judged: Judged, log: SkipLog) -> int:
    lines: dict[Path, list[str]] = {path: [] for path in paths}
    for path, sample in _kept(paths, judged):
        ((language, caption),) = sample.captions.items()
        record = {"text": caption.name} | ({} if language == UNKNOWN_LANGUAGE else {"language": language})
        lines[path].append(caption.name if path.suffix.lower() == ".txt" else json.dumps(record, ensure_ascii=False))
    for path, kept in lines.items():
        write_file(folder / path.name, "".join(f"{line}\n" for line in kept).encode())
    return sum(map(len, lines.values()))


def _text_files(source: ShardSpec) -> list[Path]:
    """The text files of a source, or none when it is of shards. Raises `DataError` for a mixture."""
    parts = [Path(part) for part in ([source] if isinstance(source, str | Path) else source)]
    texts = [part for part in parts if part.suffix.lower() in TEXT_FILES]
    if texts and len(texts) != len(parts):
        raise DataError("give shards or texts, not both")
    missing = next((path for path in texts if not path.is_file()), None)
    if missing is not None:
        raise DataError(f"no texts at {missing}")
    if len({path.name for path in texts}) != len(texts):
        raise DataError("two text files have the same name: clean them one after the other")
    return texts


def _samples(path: Path, judged: Judged) -> Iterator[Sample]:
    if path.suffix.lower() in TEXT_FILES:
        return _texts(path, judged)
    return read_shard(path, lambda *skip: judged.told.append((skip[0], skip[1], str(skip[2]))))


def _texts(path: Path, judged: Judged) -> Iterator[Sample]:
    """The lines of a text file; in a `.txt` they are of the language that its name ends in (`poems-zh.txt`), if any.

    Raises `DataError` for a file that is no text.
    """
    named = path.stem.rpartition("-")[2]
    with path.open("rb") as binary:
        encoding = encoding_of(binary.read(4))
    try:
        # bytes that are not UTF-8 become surrogates: the lines that hold them are skipped one by one
        with path.open(encoding=encoding, errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                text, language = line.strip(), named if named in LANGUAGES else UNKNOWN_LANGUAGE
                try:
                    if path.suffix.lower() != ".txt" and text:
                        text, language = _fields(parse_json(text))
                    _check_text(text)
                except ValueError as error:
                    judged.told.append((BROKEN_LINE, f"{path.name}:{number}", str(error)))
                    continue
                if not is_blank(text):
                    yield Sample(f"line {number}", None, "", {language: Caption(text)})
    except UnicodeError as error:
        raise DataError(f"{path} is not UTF-8 text") from error


def _fields(record: object) -> tuple[str, str]:
    """Text and language of a line of JSON. Raises `DataError`."""
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(record, dict) or not isinstance(text, str):
        raise DataError('not an object with a text in "text"')
    language = record.get("language") or UNKNOWN_LANGUAGE
    if not isinstance(language, str) or not is_language(language):
        raise DataError(f"{str(language)[:40]!r} is no language code such as zh, en or und")
    return text.strip(), language_code(language)


def _check_text(text: str) -> None:
    if not is_unicode(text):
        raise DataError("not UTF-8 text, or half of a surrogate pair")
    if "\0" in text:
        raise DataError("it holds a NUL character, which no text does")


def _name(key: Key) -> str:
    return f"{Path(key[0]).name}: {key[1]}"


def _note(judged: Judged, key: Key, dropped: Dropped) -> None:
    # what is personal must not live on in a log
    what = f"{len(dropped.text)} characters" if dropped.reason == PrivacyFilter.reason else dropped.text
    judged.told.append((dropped.reason, f"{_name(key)} ({dropped.language})", what))
