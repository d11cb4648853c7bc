"""All that one model does, in one table, beside the parts that do one thing each. Trains nothing.

    python -m bench.quality.one_model --model DIR --codes codes/emoji --shards shards/emoji [--beside emoji]
        [--questions codes/easy-vqa] [--answering DIR] [--pictures 600]

Of held-out pictures: bits an image code, bits a piece of their names, recall at 10 by the generator's own vectors, and
the share of the questions of --questions (split `test`) that greedy search answers exactly, if the model answers. The
parts beside it are the generator and the towers of --beside, and the generator of --answering. What a model cannot do
is left out. Codes must be those of each model's tokenizer. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from data.codes import tokenizer_hash
from generation.training.batches import RowMaker, answer_accuracy, held_out_batches, mean_bits
from generation.training.config import GeneratorDataConfig, GeneratorTrainConfig
from generation.training.pairs import CodedPairs
from mmwudao.loading.vectors import load_vector_maker
from mmwudao.pipeline import Pipeline, load
from retrieval.evaluation.evaluate import evaluate
from retrieval.evaluation.settings import RetrievalEvalConfig
from retrieval.towers.base import Towers

SPLITS = ("test-family", "test-concept")
CPU = torch.device("cpu")
Figures = dict[str, float]  # "SPLIT WHAT" -> figure


def row_maker(pipe: Pipeline, pictures: int) -> RowMaker:
    config = GeneratorTrainConfig(data=GeneratorDataConfig(test_pictures=pictures))
    return RowMaker(pipe.text, pipe.generator.config, config, pipe.features)


@torch.inference_mode()
def predicted(pipe: Pipeline, codes: Path, pictures: int) -> Figures:
    """Bits of codes and, where the model describes, of names."""
    maker, found = row_maker(pipe, pictures), Figures()
    for split in SPLITS:
        pairs = CodedPairs(codes, split)
        found[f"{split} bits a code"] = mean_bits(pipe.generator, held_out_batches(pairs, maker), CPU)["image_bits"]
        if pipe.config.describes == "tagged":
            names = held_out_batches(pairs, maker, "describe")
            found[f"{split} bits a piece"] = mean_bits(pipe.generator, names, CPU)["text_bits"]
    return found


def found_by(maker: Towers, shards: Path, pictures: int) -> Figures:
    """Recall at 10 in both directions, as means over languages, and what chance gives."""
    measured = evaluate(maker, shards, RetrievalEvalConfig(SPLITS, pictures))["splits"]
    found = Figures()
    for split in SPLITS:
        mean = measured[split]["mean"]
        for way in ("text_to_image", "image_to_text"):
            told = way.replace("_", " ")
            found[f"{split} recall {told}"] = mean[way]["recall@10"]
            found[f"{split} recall {told}, chance"] = mean["shuffled"][way]["recall@10"]
    return found


@torch.inference_mode()
def answered(pipe: Pipeline, codes: Path, pictures: int) -> Figures:
    """The share of questions that are answered exactly, where the model answers."""
    if not pipe.config.answers:
        return {}
    batches = held_out_batches(CodedPairs(codes, "test"), row_maker(pipe, pictures), "answer")
    return {"questions answered": answer_accuracy(pipe.generator, batches, CPU)}


def print_table(columns: dict[str, Figures], sizes: dict[str, str]) -> None:
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    width = max(map(len, names))
    print(f"{'':{width}}  " + "  ".join(f"{column:>24}" for column in columns))
    print(f"{'size':{width}}  " + "  ".join(f"{sizes[column]:>24}" for column in columns))
    for name in names:
        cells = (f"{figures[name]:24.4f}" if name in figures else f"{'-':>24}" for figures in columns.values())
        print(f"{name:{width}}  " + "  ".join(cells))
    rounded = {column: {name: round(value, 4) for name, value in found.items()} for column, found in columns.items()}
    print(json.dumps(rounded | {"sizes": sizes}))


def size_of(pipe: Pipeline, *parts: str) -> str:
    """Megabytes of these parts on the disk."""
    folders = [pipe.folder / pipe.config.parts[part].path for part in parts if part in pipe.config.parts]
    return f"{sum(file.stat().st_size for folder in folders for file in folder.iterdir()) / 1e6:.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a model directory whose generator makes vectors")
    parser.add_argument("--codes", type=Path, required=True)
    parser.add_argument("--shards", type=Path, required=True, help="of the pictures that the codes were made of")
    parser.add_argument("--beside", help="a model directory with a generator and towers")
    parser.add_argument("--questions", type=Path, help="codes of pictures with questions")
    parser.add_argument("--answering", help="a model directory whose generator answers")
    parser.add_argument("--pictures", type=int, default=600, help="of each split")
    arguments = parser.parse_args()
    some = arguments.pictures

    def opened(model: str, codes: Path) -> Pipeline:
        pipe = load(model, device="cpu", dtype="float32")
        if pipe.generator.config.tokenizer_hash != tokenizer_hash(codes):
            parser.error(f"{codes} are codes of another tokenizer than that of {model}")
        return pipe

    pipe = opened(arguments.model, arguments.codes)
    steps: list[tuple[str, Callable[[], Figures]]] = [
        ("one model", lambda: predicted(pipe, arguments.codes, some)),
        ("one model", lambda: found_by(load_vector_maker("generator", arguments.model, "cpu"), arguments.shards, some)),
    ]
    sizes = {"one model": size_of(pipe, "tokenizer", "generator")}
    if arguments.questions:
        steps.append(("one model", lambda: answered(pipe, arguments.questions, some)))
    if arguments.beside:
        beside = opened(arguments.beside, arguments.codes)
        steps.append(("special generator", lambda: predicted(beside, arguments.codes, some)))
        steps.append(("special towers", lambda: found_by(beside.towers, arguments.shards, some)))
        sizes |= {
            "special generator": size_of(beside, "tokenizer", "generator"),
            "special towers": size_of(beside, "towers"),
        }
    if arguments.answering and arguments.questions:
        answering = opened(arguments.answering, arguments.questions)
        steps.append(("one that answers", lambda: answered(answering, arguments.questions, some)))
        sizes["one that answers"] = size_of(answering, "tokenizer", "generator")
    columns: dict[str, Figures] = {}
    for column, measure in steps:
        columns[column] = columns.get(column, {}) | measure()
    print_table(columns, sizes)


if __name__ == "__main__":
    main()
