"""What towers find for thirty queries: `python -m bench.sheets.search_sheet --shards shards/emoji --out docs/found`.

The pictures are those of the splits that no training saw, one of each concept and family. A row of OUT.webp holds the
six nearest pictures to a query; OUT.md lists the queries and the English names of what was found. Queries were written
before the first look, in seven languages, for things, animals, food, people, places, actions and moods.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from data.images import to_square
from data.reading import open_shards
from mmwudao.loading.towers import load_model_towers

FOUND = 6
SIDE = 72  # pixels of a picture on the sheet
QUERIES = (
    "une grenouille", "ein Fahrrad", "pes", "猫", "さくら", "비행기", "a red apple", "戴墨镜的笑脸",
    "ein schlafendes Gesicht", "un bateau à voile", "hora se sněhem", "雨の日", "생일 케이크", "a broken heart",
    "下雪", "eine Ärztin", "jouer du violon", "hřib", "消防車", "국기", "something to drink", "水果", "wütend",
    "amoureux", "slon", "星空", "강아지", "a house with a garden", "音乐", "ein Werkzeug",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, required=True, nargs="+")
    parser.add_argument("--splits", nargs="+", default=["test-concept", "test-family"])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--out", type=Path, default=Path("docs/found"))
    arguments = parser.parse_args()
    towers = load_model_towers(arguments.model)
    examples = [
        example for shards in arguments.shards for split in arguments.splits for example in open_shards(shards, split)
    ]
    samples, pictures = [sample for sample, _ in examples], [to_square(image, SIDE) for _, image in examples]
    vectors = towers.encode_image([image for _, image in examples])
    nearest = (towers.encode_text(list(QUERIES)) @ vectors.T).topk(FOUND)
    sheet = Image.new("RGB", (SIDE * FOUND, SIDE * len(QUERIES)), "white")
    lines = [f"| | query | found among {len(samples)} pictures, nearest first |", "|---|---|---|"]
    for row, (query, places) in enumerate(zip(QUERIES, nearest.indices.tolist(), strict=True)):
        names = []
        for column, place in enumerate(places):
            sheet.paste(pictures[place], (SIDE * column, SIDE * row))
            names.append(samples[place].captions["en"].name)
        lines.append(f"| {row + 1} | {query} | {', '.join(names)} |")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.out.with_suffix(".webp"), quality=80)
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
