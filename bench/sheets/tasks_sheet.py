"""Every task on held-out pictures: `python -m bench.sheets.tasks_sheet --shards shards/emoji --out docs/tasks`.

Ten pictures of `test-family`, one a base concept, nothing picked by hand. A row of OUT.webp: the real picture; its top
half completed; its left half completed; of 16 pictures drawn from its name, the best and the worst by `rerank`; the
real picture at the tokenizer's resolution, upscaled (if the model has an upscaler). OUT.md lists the captions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from data.images import to_square
from data.reading import open_shards
from data.styles import LANGUAGES
from mmwudao.pipeline import load

COLUMNS = ("real", "top half kept", "left half kept", "best of 16", "worst of 16", "upscaled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/tasks"))
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--split", default="test-family")
    parser.add_argument("--pictures", type=int, default=10)
    parser.add_argument("--candidates", type=int, default=16)
    arguments = parser.parse_args()
    pipe = load(arguments.model)
    size = pipe.config.image_size
    seen: set[str | None] = set()
    rows: list[tuple[str, str, str, str, Image.Image]] = []
    for sample, image in open_shards(arguments.shards, arguments.split):
        if sample.family not in pipe.config.styles or sample.base_concept in seen:
            continue
        seen.add(sample.base_concept)
        language = LANGUAGES[len(rows) % len(LANGUAGES)]
        rows.append((sample.id, sample.captions[language].name, language, sample.family, to_square(image, size)))
        if len(rows) == arguments.pictures:
            break
    sheet = Image.new("RGB", (2 * size * len(COLUMNS), 2 * size * len(rows)), "white")
    lines = []
    captions = {language: pipe.caption([row[-1] for row in rows], language) for language in LANGUAGES}
    for i, (name, prompt, language, style, real) in enumerate(rows):
        drawn = pipe.generate(prompt, n=arguments.candidates, candidates=arguments.candidates, seed=0, style=style)
        cells = [
            real,
            *pipe.complete(real, prompt, "top:0.5", seed=0, style=style),
            *pipe.complete(real, prompt, "left:0.5", seed=0, style=style),
            drawn[0],
            drawn[-1],
            *(pipe.upscale([real]) if "upscaler" in pipe.config.parts else ()),
        ]
        for k, cell in enumerate(cells):
            sheet.paste(cell.resize((2 * size, 2 * size), Image.Resampling.NEAREST), (2 * size * k, 2 * size * i))
        told = captions[language][i]
        lines.append(f"| {i + 1} | {name} | {language} | {prompt} | {told} | {captions['en'][i]} |")
        print(lines[-1], flush=True)
    sheet.save(arguments.out.with_suffix(".webp"), quality=82, method=6)
    head = (
        f"# The tasks on ten held-out pictures, by `{arguments.model}`\n\n"
        f"Pictures of `{arguments.split}` that the model never saw, one a base concept, nothing picked, seed 0.\n"
        f"Columns: {', '.join(COLUMNS)}. Made by\n"
        f"`python -m bench.sheets.tasks_sheet --shards shards/{arguments.shards.name}`.\n\n"
        f"![]({arguments.out.name}.webp)\n\n"
        "| row | picture | language | its name | caption | English caption |\n|---|---|---|---|---|---|\n"
    )
    arguments.out.with_suffix(".md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    print(arguments.out.with_suffix(".webp"))


if __name__ == "__main__":
    main()
