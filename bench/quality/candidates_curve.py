"""What choosing among candidates brings: R-precision and nearness to training pictures against their number.

    python -m bench.quality.candidates_curve emoji shards/emoji --judges runs/judge/towers old-towers

Of each prompt the most candidates are drawn once; of the first n of them the model's own towers choose one. Columns:
candidates; by each judge the R-precision in % of what was chosen (mean over languages), real pictures in the last row;
the median cosine of what was chosen with its nearest training picture, by the first judge (a copy must not win by being
a copy); seconds of drawing and choosing for each picture that is kept. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from statistics import mean, median

import torch

from data.reading import open_shards
from data.styles import LANGUAGES
from mmwudao import load
from mmwudao.evaluation import candidate_texts, choose_held_out, nearest_pictures, prompt_of, r_precision
from mmwudao.evaluation_settings import GeneratorEvalConfig
from mmwudao.loading.towers import load_model_towers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("shards", type=Path)
    parser.add_argument("--judges", nargs="+", required=True, help="models or folders of towers")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--prompts", type=int, default=8, help="in each language")
    parser.add_argument("--split", default="test-family")
    parser.add_argument("--train-limit", type=int, default=4000)
    arguments = parser.parse_args()
    config = GeneratorEvalConfig(split=arguments.split, prompts=arguments.prompts)
    pipe, counts = load(arguments.model, device="cpu"), sorted(arguments.candidates)
    chosen, samples = choose_held_out(arguments.shards, config, pipe.config.styles)
    pictured = [sample for sample, _ in chosen]
    asked = [(language, sample) for language in LANGUAGES for sample in pictured]
    texts = {language: candidate_texts(pictured, samples, language, config) for language in LANGUAGES}
    drawn, scores, seconds = [], [], 0.0
    for number, (language, sample) in enumerate(asked):
        prompt = prompt_of(sample, language, pipe.config.styles)
        started = time.perf_counter()
        images = pipe.generate(prompt, n=counts[-1], candidates=0, seed=number * counts[-1])
        scores.append(torch.tensor(pipe.rerank(prompt, images, by=pipe.config.selection.judge)))
        seconds += (time.perf_counter() - started) / len(asked)
        drawn.append(images)
    seen = {"real": [image for _, image in chosen] * len(LANGUAGES)}
    for count in counts:
        seen[str(count)] = [images[int(one[:count].argmax())] for images, one in zip(drawn, scores, strict=True)]
    rows: dict[str, dict[str, float]] = {name: {} for name in seen}
    for count in counts:
        rows[str(count)]["seconds"] = seconds * count / counts[-1]
    for place, judge in enumerate(arguments.judges):
        towers = load_model_towers(judge)
        for name, pictures in seen.items():
            features = towers.encode_image(pictures)
            parts = zip(LANGUAGES, features.split(len(pictured)), strict=True)
            right = [r_precision(towers, own, texts[language]) for language, own in parts]
            rows[name][f"R {place + 1}"] = 100 * mean(right)
            if place == 0:
                training = islice(open_shards(arguments.shards, "train"), arguments.train_limit)
                nearest = nearest_pictures(towers, features, training, 1)
                rows[name]["nearest"] = median(found[0].similarity for found in nearest)
    _print(rows, arguments)


def _print(rows: dict[str, dict[str, float]], arguments: argparse.Namespace) -> None:
    columns = [*(f"R {place + 1}" for place in range(len(arguments.judges))), "nearest", "seconds"]
    for place, judge in enumerate(arguments.judges):
        print(f"R {place + 1}: {judge}")
    print("candidates", *(f"{name:>8}" for name in columns))
    for name, row in rows.items():
        print(f"{name:>10}", *(f"{row[column]:8.3f}" if column in row else " " * 8 for column in columns))
    judges = [str(judge) for judge in arguments.judges]
    print(json.dumps({"split": arguments.split, "prompts": arguments.prompts, "judges": judges, "rows": rows}))


if __name__ == "__main__":
    main()
