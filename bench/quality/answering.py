"""How many questions a generator answers exactly: `python -m bench.quality.answering --codes codes/easy-vqa --generator
runs/easy-vqa/generator --text shards/easy-vqa/text.model`.

For each language and kind of question of the test split: the share that greedy search answers exactly, free and with
the pictures of others (which tells what the question alone gives away to this model), beside the answer that is most
frequent in training among questions of that kind, and the most frequent one for the same question. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data.sample import Question
from data.text import TextTokenizer
from generation.rows.base import CodedPicture
from generation.rows.row import collate
from generation.training.batches import HELD_OUT_BATCH, RowMaker, exact_answers
from generation.training.config import GeneratorTrainConfig
from generation.training.pairs import CodedPairs
from generation.transformer.model import Transformer
from vqvae.storage.parts import load_part

ALL = "all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codes", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--generator", type=Path, help="leave it out to see the baselines alone")
    parser.add_argument("--split", default="test")
    parser.add_argument("--pictures", type=int, help="the first so many of the split; default: all")
    arguments = parser.parse_args()
    train, test = CodedPairs(arguments.codes, "train"), CodedPairs(arguments.codes, arguments.split)
    pictures = [test.picture(number) for number in range(len(test))]
    pictures = [one for one in pictures if one.sample.questions][: arguments.pictures]
    asked = [question for one in pictures for question in one.sample.questions]
    known = [question for sample in train.samples for question in sample.questions]
    columns = {
        "majority": most_frequent(known, asked, lambda one: (one.language, one.kind)),
        "by question": most_frequent(known, asked, lambda one: (one.language, one.question)),
    }
    if arguments.generator:
        model = load_part(Transformer, arguments.generator).float().eval()
        maker = RowMaker(TextTokenizer(arguments.text), model.config, GeneratorTrainConfig())
        turned = [*pictures[1:], *pictures[:1]]
        others = [CodedPicture(one.sample, other.codes) for one, other in zip(pictures, turned, strict=True)]
        columns |= {"answered": answered(model, maker, pictures), "other picture": answered(model, maker, others)}
    print_table(asked, columns)


def most_frequent(
    known: Sequence[Question], asked: Sequence[Question], key: Callable[[Question], tuple[str, str]]
) -> list[bool]:
    """Whether each question is answered by the answer that is most frequent in training among questions of its key."""
    counts: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for one in known:
        counts[key(one)][one.answer] += 1
    best = {name: max(sorted(found), key=found.__getitem__) for name, found in counts.items()}
    return [best.get(key(one)) == one.answer for one in asked]


def answered(model: Transformer, maker: RowMaker, pictures: Sequence[CodedPicture]) -> list[bool]:
    """Whether greedy search answers each question of the pictures exactly."""
    return [hit for row in _rows(model, maker, pictures) for hit in row]


def _rows(model: Transformer, maker: RowMaker, pictures: Sequence[CodedPicture]) -> Iterator[list[bool]]:
    rows = [maker.kind("answer").held_out_row(one, maker.recipe, named_style=False) for one in pictures]
    for start in range(0, len(rows), HELD_OUT_BATCH):
        yield from exact_answers(model, collate(maker.model.vocabulary, rows[start : start + HELD_OUT_BATCH]))


def print_table(asked: Sequence[Question], columns: dict[str, list[bool]]) -> None:
    """A line for each language and kind, then one for all, then JSON."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for number, one in enumerate(asked):
        groups[f"{one.language} {one.kind}".strip()].append(number)
    groups[ALL] = list(range(len(asked)))
    print(f"{'':16} {'questions':>10} " + " ".join(f"{name:>14}" for name in columns))
    record = {}
    for name, numbers in groups.items():
        shares = {column: round(sum(hits[k] for k in numbers) / len(numbers), 4) for column, hits in columns.items()}
        record[name] = {"questions": len(numbers), **shares}
        print(f"{name:16} {len(numbers):10,} " + " ".join(f"{share:14.4f}" for share in shares.values()))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
