"""The uncurated sheet of docs/: `python -m bench.sheets.held_out_sheet --shards shards/emoji --out docs/held-out`.

The first prompts of `test-family` in each of the seven languages, drawn with seed 0: a row is the real picture (which
was never trained on), then the drawn ones. Writes OUT.webp and OUT.md, which lists the prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from data.images import to_square
from data.reading import open_shards
from data.styles import LANGUAGES, with_style
from mmwudao.pipeline import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/held-out"))
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--split", default="test-family")
    parser.add_argument("--prompts", type=int, default=2, help="of each language")
    parser.add_argument("-n", type=int, default=4, help="pictures a prompt")
    arguments = parser.parse_args()
    pipe = load(arguments.model)
    size = pipe.config.image_size
    needed = arguments.prompts * len(LANGUAGES)
    seen: set[str | None] = set()
    rows: list[tuple[str, str, str, Image.Image]] = []
    for sample, image in open_shards(arguments.shards, arguments.split):
        # one picture a base concept: else skin tones would fill the sheet
        if sample.family not in pipe.config.styles or sample.base_concept in seen:
            continue
        seen.add(sample.base_concept)
        language = LANGUAGES[len(rows) % len(LANGUAGES)]
        prompt = with_style(sample.captions[language].name, sample.family, language)
        rows.append((prompt, language, sample.id, to_square(image, size)))
        if len(rows) == needed:
            break
    drawn = pipe.generate([prompt for prompt, *_ in rows], n=arguments.n, seed=0)
    gap = size // 8
    sheet = Image.new("RGB", ((arguments.n + 1) * size + gap, len(rows) * size), "white")
    lines = [f"| row | language | prompt | picture of `{arguments.split}` |", "|---|---|---|---|"]
    for i, (prompt, language, name, real) in enumerate(rows):
        sheet.paste(real, (0, i * size))
        for k in range(arguments.n):
            sheet.paste(drawn[i * arguments.n + k], (size + gap + k * size, i * size))
        lines.append(f"| {i + 1} | {language} | {prompt} | {name} |")
    sheet.save(arguments.out.with_suffix(".webp"), quality=82, method=6)
    head = (
        f"# Held-out prompts, drawn by `{arguments.model}`\n\n"
        f"The first prompts of `{arguments.split}` in each language, seed 0, nothing picked by hand. On the left the\n"
        "real picture, which the model never saw (it saw the concept in other families). Made by\n"
        f"`python -m bench.sheets.held_out_sheet --shards shards/{arguments.shards.name}`.\n\n"
        f"![]({arguments.out.name}.webp)\n\n"
    )
    arguments.out.with_suffix(".md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    print(arguments.out.with_suffix(".webp"))


if __name__ == "__main__":
    main()
