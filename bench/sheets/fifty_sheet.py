"""Fifty fixed prompts in seven languages, one picture of each: `python -m bench.sheets.fifty_sheet --out docs/fifty`.

OUT.webp holds the pictures, ten in a row, by the model's defaults and seed 0; OUT.md lists the prompts. Prompts were
written before the first look and are not changed. The pictures are to be named by somebody who has not seen the list:
`--guesses FILE` (a line for each picture) writes those names beside the prompts; who reads both says which are right.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from PIL import Image

from data.images import to_square
from mmwudao import load

COLUMNS = 10
SIDE = 96  # pixels of a picture on the sheet
PROMPTS = (
    "a red apple", "戴墨镜的笑脸", "ein schlafendes Gesicht", "un cœur rouge", "猫", "pes", "꽃", "国旗",
    "雪だるま", "자전거", "a yellow banana", "火车", "ein Fisch", "un arbre", "slunce", "月", "우산",
    "an umbrella", "房子", "ein Auto", "une tasse de café", "kniha", "犬", "피자", "a birthday cake", "飞机",
    "ein Schmetterling", "un ballon", "hodiny", "さくら", "하트", "a crying face", "愤怒的脸", "ein Pferd",
    "une étoile", "houba", "魚", "물고기", "a green frog", "吉他", "ein Regenbogen", "un sapin de Noël", "strom",
    "ペンギン", "고양이", "a blue car", "紫色的心", "eine Krone", "une fraise", "raketa",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guesses", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/fifty"))
    arguments = parser.parse_args()
    pipe = load(arguments.model, device="cpu")
    started = time.perf_counter()
    pictures = [pipe.generate(prompt, seed=arguments.seed)[0] for prompt in PROMPTS]
    seconds = time.perf_counter() - started
    sheet = Image.new("RGB", (SIDE * COLUMNS, SIDE * -(-len(PROMPTS) // COLUMNS)), "white")
    for place, picture in enumerate(pictures):
        sheet.paste(to_square(picture, SIDE), (SIDE * (place % COLUMNS), SIDE * (place // COLUMNS)))
    guesses = arguments.guesses.read_text(encoding="utf-8").splitlines() if arguments.guesses else []
    chosen = pipe.config.selection.candidates
    lines = [
        f"# Fifty prompts, by `{arguments.model}`",
        "",
        f"One picture of each, seed {arguments.seed}, {chosen} candidates a picture, nothing picked; rows of ten.",
        f"Made by `python -m bench.sheets.fifty_sheet` in {seconds:.0f} s.",
        "",
        f"![]({arguments.out.name}.webp)",
        "",
        "| | prompt |" + (" named without seeing it |" if guesses else ""),
        "|---|---|" + ("---|" if guesses else ""),
    ]
    for place, prompt in enumerate(PROMPTS):
        guess = f" {guesses[place]} |" if guesses else ""
        lines.append(f"| {place + 1} | {prompt} |{guess}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.out.with_suffix(".webp"), quality=85, method=6)
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(arguments.out.with_suffix(".webp"), f"{seconds:.0f} s")


if __name__ == "__main__":
    main()
