"""easy-VQA: pictures of one shape in one colour, and questions about them in English (Victor Zhou 2019, MIT).

A wheel of the Python registry holds all of it: 4,000 + 1,000 PNGs of 64 px, 38,575 + 9,673 questions and 13 answers.
It is read as a file. The best answer to a question without its picture is right in 0.670 of the test questions.
"""

from __future__ import annotations

import zipfile
from collections import defaultdict
from pathlib import Path

from data.atomic import check_unused, new_folder
from data.recipes.pypi import Wheel, fetch_wheel
from data.recipes.settings import EasyVqaSettings
from data.recipes.splits import stable_hash
from data.records import parse_json
from data.sample import DataError, Question, Sample
from data.shards import Manifest, ShardInfo, ShardWriter, read_manifest, write_manifest
from data.text import TextTokenizer

EASY_VQA = Wheel("easy-vqa", "1.0", "py3-none-any", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f")
EASY_VQA_LICENCE = "MIT"
EASY_VQA_SPLITS = ("train", "test")
SIDE_OF_PICTURES = 64  # px
TEXT_PIECES = 400  # at most: the questions have few words, and 256 pieces are bytes
_SHAPES = {"circle", "rectangle", "triangle"}


def build_easy_vqa(out: Path, settings: EasyVqaSettings | None = None) -> Manifest:
    """Build the shards into the new folder `out`, with a `text.model` made of the training questions beside them.

    Raises `DataError` for an existing `out`, a wheel that cannot be fetched or that is not of the known form.
    """
    out, settings = Path(out), settings or EasyVqaSettings()
    check_unused(out)
    wheel = fetch_wheel(EASY_VQA, settings.cache)
    with new_folder(out) as building, zipfile.ZipFile(wheel) as file:
        splits: dict[str, list[ShardInfo]] = {}
        for split in EASY_VQA_SPLITS:
            samples = _samples(file, split, settings.limit)
            with ShardWriter(building, split, settings.samples_per_shard) as writer:
                for sample in samples:
                    writer.write(sample)
            splits[split] = writer.shards
            if split == "train":
                texts = [f"{one.question} {one.answer}" for sample in samples for one in sample.questions]
                TextTokenizer.train(texts, building / "text.model", TEXT_PIECES)
        sources = {EASY_VQA.name: EASY_VQA.version}
        write_manifest(building, Manifest("easy-vqa", SIDE_OF_PICTURES, splits, sources))
    return read_manifest(out)


def question_kind(answer: str) -> str:
    """What a question asks for, told by its answer: "yes-no", "shape" or "colour"."""
    if answer in ("yes", "no"):
        return "yes-no"
    return "shape" if answer in _SHAPES else "colour"


def _samples(file: zipfile.ZipFile, split: str, limit: int | None) -> list[Sample]:
    """The pictures of a split that have questions, by their numbers."""
    folder = f"easy_vqa/data/{split}"
    asked: defaultdict[int, list[Question]] = defaultdict(list)
    try:
        for question, answer, number in parse_json(file.read(f"{folder}/questions.json")):
            asked[int(number)].append(Question("en", question, answer, question_kind(answer)))
        numbers = sorted(asked)
        if limit is not None:
            numbers = sorted(sorted(numbers, key=lambda number: stable_hash(f"{split}:{number}"))[:limit])
        pictures = {number: file.read(f"{folder}/images/{number}.png") for number in numbers}
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{EASY_VQA.file} is not of the known form ({error})") from error
    return [
        Sample(
            id=f"easy-vqa-{split}-{number:05d}",
            image=picture,
            extension="png",
            family="easy-vqa",
            licence=EASY_VQA_LICENCE,
            source=EASY_VQA.origin,
            questions=tuple(asked[number]),
        )
        for number, picture in pictures.items()
    ]
