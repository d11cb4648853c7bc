"""How often the caption of a held-out picture is its name: `python -m bench.quality.captioning --shards shards/emoji`.

For each language, by the generator alone and judged by the towers (where the model has them): the share of captions
that equal the picture's name; that begin with it up to the colon, where skin tones follow ("man: dark skin tone"); and
the same for captions of other pictures (shuffled), as a baseline. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

from data.images import to_square
from data.reading import open_shards
from data.styles import LANGUAGES
from mmwudao.pipeline import load
from mmwudao.tasks import Writer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--pictures", type=int, default=100, help="of each split")
    parser.add_argument("--splits", default="test-family,test-concept")
    parser.add_argument("--languages", default=",".join(LANGUAGES))
    arguments = parser.parse_args()
    pipe = load(arguments.model)
    writers: list[Writer] = ["generator", "both"] if "towers" in pipe.config.parts else ["generator"]
    record: dict[str, list[dict[str, object]]] = {}
    print(f"{'split':14} {'language':8} {'by':10} {'exact':>6} {'base':>6} {'shuffled':>9}")
    for split in arguments.splits.split(","):
        kept = [
            (sample, to_square(image, pipe.config.image_size))
            for sample, image in open_shards(arguments.shards, split)
            if sample.family in pipe.config.styles
        ]
        chosen = random.Random(0).sample(kept, min(arguments.pictures, len(kept)))
        images = [image for _, image in chosen]
        record[split] = []
        for language in arguments.languages.split(","):
            names = [sample.captions[language].name for sample, _ in chosen]
            for by in writers:
                told = pipe.caption(images, language, by)
                others = random.Random(1).sample(names, len(names))
                exact = _share(a == b for a, b in zip(told, names, strict=True))
                base = _share(_base(a) == _base(b) for a, b in zip(told, names, strict=True))
                shuffled = _share(_base(a) == _base(b) for a, b in zip(told, others, strict=True))
                row = {"language": language, "by": by, "exact": exact, "base": base, "shuffled_base": shuffled}
                record[split].append(row)
                print(f"{split:14} {language:8} {by:10} {exact:6.3f} {base:6.3f} {shuffled:9.3f}", flush=True)
    print(json.dumps(record))


def _base(name: str) -> str:
    return name.replace("：", ":").partition(":")[0].strip()


def _share(hits: Iterable[bool]) -> float:
    found = list(hits)
    return round(sum(found) / len(found), 4)


if __name__ == "__main__":
    main()
