"""The uncurated sheet of a learned style: `python -m bench.sheets.style_sheet --shards shards/emoji --adapter DIR`.

A row is a real picture of the family that was not trained on, then the same prompt and seeds drawn without and with the
adapter. The first prompts of the splits, seed 0, languages in turn; nothing in a prompt names the family.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from data.images import to_square
from data.reading import open_shards
from data.styles import LANGUAGES
from mmwudao.pipeline import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/style.webp"))
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--splits", nargs="+", default=["test-family", "test-concept"])
    parser.add_argument("--prompts", type=int, default=4, help="of each split")
    parser.add_argument("-n", type=int, default=3, help="pictures a prompt, without and with the adapter")
    arguments = parser.parse_args()
    styled = load(arguments.model, adapter=arguments.adapter)
    assert styled.adapter is not None
    size = styled.config.image_size
    prompts: list[str] = []
    real: list[Image.Image] = []
    for split in arguments.splits:
        wanted, seen = len(prompts) + arguments.prompts, set()
        for sample, image in open_shards(arguments.shards, split):
            # one picture a base concept: else skin tones would fill the sheet
            if sample.family != styled.adapter.style or sample.base_concept in seen or len(prompts) == wanted:
                continue
            seen.add(sample.base_concept)
            prompts.append(sample.captions[LANGUAGES[len(prompts) % len(LANGUAGES)]].name)
            real.append(to_square(image, size))
    if not prompts:
        parser.error(f"{arguments.shards} holds no held-out pictures of {styled.adapter.style}")
    drawn = [pipe.generate(prompts, n=arguments.n, seed=0) for pipe in (load(arguments.model), styled)]
    n, gap = arguments.n, size // 8
    sheet = Image.new("RGB", ((2 * n + 1) * size + 2 * gap, len(prompts) * size), "white")
    for i, picture in enumerate(real):
        sheet.paste(picture, (0, i * size))
        for block, pictures in enumerate(drawn):
            for k in range(n):
                sheet.paste(pictures[i * n + k], ((1 + block * n + k) * size + (block + 1) * gap, i * size))
    # 256 colours: a third of the bytes
    sheet.quantize(256).save(arguments.out, optimize=True)
    for i, prompt in enumerate(prompts):
        print(f"{i + 1}. {prompt}")
    print(arguments.out)


if __name__ == "__main__":
    main()
