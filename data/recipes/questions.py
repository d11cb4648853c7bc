"""Questions about pictures that shards hold already, made from facts by a program, as CLEVR's are (Johnson et al. 2017,
arXiv:1612.06890): what it is, its skin tone, its main colour; and, of scenes of two to four of them on one canvas, how
many there are, and what is left of and above what.

The splits are those of the pictures, so what is held out as a concept stays so. Scenes of the training split never hold
two of the concepts that scenes of the split `test-combination` show together.
"""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from PIL import Image

from data.atomic import check_unused, new_folder
from data.images import open_image, to_square
from data.reading import Skip, read_entries
from data.recipes.picture_facts import ASKED, COLOUR_WORDS, COLOURS, ask_about, base_name, main_colour, skin_tone
from data.recipes.settings import QuestionSettings
from data.recipes.splits import stable_hash
from data.sample import DataError, Question, Sample
from data.shards import Manifest, ShardWriter, read_manifest, write_manifest

TRAIN, TEST_COMBINATION = "train", "test-combination"
HELD_OUT_PAIRS = 0.05  # of the pairs of concepts
CELLS = [(row, column) for row in range(2) for column in range(2)]
TRIES = 200  # for a scene that belongs to its split


def build_questions(source: Path, out: Path, settings: QuestionSettings | None = None) -> Manifest:
    """Ask about the pictures of the folder `source` and about scenes of them; write all into the new folder `out`.

    Raises `DataError` for an existing `out`, or a source that is no folder of shards of one size.
    """
    source, out, settings = Path(source), Path(out), settings or QuestionSettings()
    check_unused(out)
    manifest = read_manifest(source)
    if manifest.image_size is None:
        raise DataError(f"{source} holds pictures of many sizes: pack them with --size")
    skipped: Counter[str] = Counter()
    splits = {}
    with new_folder(out) as building:
        for split, shards in manifest.splits.items():
            pictures = _pictures([source / shard.file for shard in shards], skipped, settings.limit)
            with ShardWriter(building, split, settings.samples_per_shard) as writer:
                for one in pictures:
                    writer.write(replace(one, questions=picture_questions(one)))
                for scene in _scenes(pictures, split, settings.scenes, manifest.image_size):
                    writer.write(scene)
            splits[split] = writer.shards
            if split == TRAIN:
                with ShardWriter(building, TEST_COMBINATION, settings.samples_per_shard) as writer:
                    for scene in _scenes(pictures, TEST_COMBINATION, settings.scenes * 0.05, manifest.image_size):
                        writer.write(scene)
                splits[TEST_COMBINATION] = writer.shards
        made = Manifest(f"{manifest.name}-questions", manifest.image_size, splits, manifest.sources, dict(skipped))
        write_manifest(building, made)
    return read_manifest(out)


def picture_questions(sample: Sample) -> tuple[Question, ...]:
    """What is asked about one picture, in each language of its captions that we have questions in."""
    colour = main_colour(open_image(sample.require_image()))
    found = []
    for language, caption in sorted(sample.captions.items()):
        if language not in COLOUR_WORDS:
            continue
        found.append(ask_about("name", language, base_name(sample.concept, caption)))
        if tone := skin_tone(sample.concept, caption):
            found.append(ask_about("tone", language, tone))
        if colour:
            found.append(ask_about("colour", language, COLOUR_WORDS[language][COLOURS.index(colour)]))
    return tuple(found)


def is_held_out_pair(one: str, other: str) -> bool:
    """Whether two concepts are shown together in the split `test-combination` alone; by hash, in either order."""
    return int(stable_hash("pair:" + ":".join(sorted((one, other))))[:15], 16) / 16**15 < HELD_OUT_PAIRS


def scene_of(placed: Sequence[tuple[tuple[int, int], Sample]], id: str, size: int) -> Sample:
    """Pictures in cells (row, column) of a white canvas of 2 x 2 cells, `size` px a side, with its questions."""
    canvas = Image.new("RGB", (size, size), "white")
    for (row, column), sample in placed:
        picture = to_square(open_image(sample.require_image()), size // 2)
        canvas.paste(picture, (column * (size // 2), row * (size // 2)))
    cells, questions = dict(placed), []
    languages = set.intersection(*(set(sample.captions) for _, sample in placed))
    for language in sorted(languages & set(ASKED["count"])):
        names = {cell: base_name(sample.concept, sample.captions[language]) for cell, sample in cells.items()}
        questions.append(ask_about("count", language, str(len(placed))))
        for line in range(2):
            for kind, first, second in (("left", (line, 0), (line, 1)), ("above", (0, line), (1, line))):
                if first in names and second in names:
                    questions.append(ask_about(kind, language, names[first], names[second]))
    encoded = io.BytesIO()
    canvas.save(encoded, "WEBP", lossless=True, method=1, quality=50)
    pictures = [sample for _, sample in placed]
    return Sample(
        id,
        encoded.getvalue(),
        "webp",
        family=_together(sample.family for sample in pictures),
        licence=_together(sample.licence for sample in pictures),
        source=_together(sample.source for sample in pictures),
        questions=tuple(questions),
    )


def _together(values: Iterable[str | None]) -> str | None:
    """Each of the values once, as in "Apache-2.0 AND MIT"; None for none."""
    return " AND ".join(sorted({value for value in values if value})) or None


def _scenes(pictures: Sequence[Sample], split: str, share: float, size: int) -> Iterator[Sample]:
    """Scenes of a split, `share` of the number of its pictures."""
    named = [sample for sample in pictures if sample.captions]
    for number in range(round(share * len(named))):
        rng = random.Random(f"{split} scene {number}")
        for _ in range(TRIES):
            shown = rng.sample(named, min(len(named), rng.randint(2, 4)))
            concepts = [sample.base_concept or sample.id for sample in shown]
            apart = [is_held_out_pair(one, other) for one, other in combinations(concepts, 2)]
            suits = any(apart) if split == TEST_COMBINATION else split != TRAIN or not any(apart)
            if suits and len(set(concepts)) == len(concepts) > 1:
                cells = rng.sample(CELLS, len(shown))
                yield scene_of(list(zip(cells, shown, strict=True)), f"scene-{split}-{number:05d}", size)
                break


def _pictures(shards: Sequence[Path], skipped: Counter[str], limit: int | None) -> list[Sample]:
    """The samples of shards with captions; those that cannot be read are counted."""
    found = []
    for shard in shards:
        for entry in read_entries(shard):
            if isinstance(entry, Skip):
                skipped[entry.reason] += 1
            else:
                found.append(entry)
    if limit is not None:
        kept = set(sorted((sample.id for sample in found), key=stable_hash)[:limit])
        found = [sample for sample in found if sample.id in kept]
    return found
