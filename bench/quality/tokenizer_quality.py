"""What tokenizers keep of pictures, in one table.

    python -m bench.quality.tokenizer_quality SHARDS emoji@128 runs/emoji-tokenizer/tokenizer@96 \\
        --towers emoji --trunk trunks/lite2 --sheet docs/tokenizers.png

Each tokenizer is a shipped model, a model directory or a tokenizer's folder, with the side of its pictures behind @.
Held-out pictures are scaled to that side, encoded and decoded. Columns: codes and bits a picture (log2 of the codebook
each: no code is cheaper); PSNR in dB against the scaled picture; for each towers the R-precision in %, how often a
picture's own caption is the nearest among --candidates, mean over languages; for each trunk how often the
reconstruction's nearest picture among all measured ones is its own original, by the cosine of the pooled last map. Row
`real @S` is the picture scaled to S pixels and not coded. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.images import to_square, to_tensor
from data.reading import Example, open_shards
from data.sample import Sample
from data.styles import LANGUAGES
from mmwudao.evaluation import GeneratorEvalConfig, candidate_texts
from mmwudao.loading.model_dir import load_tokenizer
from mmwudao.loading.towers import load_model_towers
from retrieval.evaluation.evaluate import concept_of
from retrieval.towers.base import Towers
from vqvae.psnr import psnr
from vqvae.tokenize import tensor_to_image
from vqvae.trunk import Trunk, load_trunk

LOST = ["fxemoji", "streamline-emojis"]  # families that no part was trained on
BATCH = 32
SHOWN = 12  # pictures of the sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("tokenizers", nargs="+", metavar="TOKENIZER@SIDE")
    parser.add_argument("--towers", nargs="*", default=["emoji"], help="models or folders that judge")
    parser.add_argument("--trunk", nargs="*", default=[], type=Path, help="folders of trunks that judge")
    parser.add_argument("--split", default="test-family")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--sheet", type=Path)
    arguments = parser.parse_args()
    asked = [_asked(text, parser) for text in arguments.tokenizers]
    chosen, samples = choose_pictures(arguments.shards, arguments.split, arguments.pictures)
    rows: dict[str, list[Image.Image]] = {}
    record: dict[str, dict[str, Any]] = {}
    for side in sorted({side for _, side in asked}):
        rows[f"real @{side}"] = [to_square(image, side) for _, image in chosen]
        record[f"real @{side}"] = {}
    for name, side in asked:
        key = f"{name}@{side}"
        rows[key], record[key] = restore(name, rows[f"real @{side}"])
    pictured = [sample for sample, _ in chosen]
    for source in arguments.towers:
        judge = CaptionJudge(load_model_towers(source, "cpu"), pictured, samples, arguments.candidates)
        for key, pictures in rows.items():
            record[key][f"R {source}"] = round(100 * judge.r_precision(pictures), 1)
    for folder in arguments.trunk:
        trunk = load_trunk(folder).float()
        originals = trunk_features(trunk, [image for _, image in chosen])
        for key, pictures in rows.items():
            nearest = (trunk_features(trunk, pictures) @ originals.T).argmax(dim=1)
            own = (nearest == torch.arange(len(pictures))).double().mean()
            record[key][f"own {folder.name}"] = round(100 * float(own), 1)
    _print(record)
    if arguments.sheet:
        _save_sheet(list(rows.values()), arguments.sheet)
    print(json.dumps({"split": arguments.split, "pictures": len(chosen), "rows": record}))


def choose_pictures(shards: Path, split: str, count: int) -> tuple[list[Example], list[Sample]]:
    """Up to `count` examples of different concepts, of families that parts were trained on, and all samples."""
    chosen: dict[str, Example] = {}
    samples = []
    for example in open_shards(shards, split):
        samples.append(example.sample)
        if len(chosen) < count and example.sample.family not in LOST:
            chosen.setdefault(concept_of(example.sample), example)
    return list(chosen.values()), samples


@torch.no_grad()
def restore(name: str, pictures: Sequence[Image.Image]) -> tuple[list[Image.Image], dict[str, Any]]:
    """The pictures encoded and decoded by a tokenizer, with its figures."""
    tokenizer = load_tokenizer(name).float()
    made: list[Image.Image] = []
    values: list[Tensor] = []
    counts = torch.zeros(tokenizer.config.codebook_size)
    for start in range(0, len(pictures), BATCH):
        pixels = torch.stack([to_tensor(image) for image in pictures[start : start + BATCH]])
        codes = tokenizer.encode(pixels)
        restored = tokenizer.decode(codes)
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
        values.append(psnr(restored, pixels))
        made += [tensor_to_image(picture) for picture in restored]
    bits = codes[0].numel() * math.log2(tokenizer.config.codebook_size)
    shares = counts[counts > 0] / counts.sum()
    return made, {
        "codes": codes[0].numel(),
        "bits": round(bits),
        "entropy": round(codes[0].numel() * float(-(shares * shares.log2()).sum())),
        "PSNR": round(float(torch.cat(values).mean()), 2),
    }


class CaptionJudge:
    """R-precision by towers: the texts of every language are encoded once, whatever pictures come."""

    def __init__(self, towers: Towers, pictured: list[Sample], samples: list[Sample], candidates: int) -> None:
        self.towers = towers
        config = GeneratorEvalConfig(prompts=len(pictured), candidates=candidates)
        self.features: list[tuple[list[int], Tensor]] = []  # which pictures have a caption, and [N, candidates, D]
        for language in LANGUAGES:
            known = [k for k, sample in enumerate(pictured) if language in sample.captions]
            if known:
                texts = candidate_texts([pictured[k] for k in known], samples, language, config)
                distinct = {text: k for k, text in enumerate(dict.fromkeys(text for row in texts for text in row))}
                encoded = towers.encode_text(list(distinct))
                self.features.append(
                    (known, encoded[torch.tensor([[distinct[text] for text in row] for row in texts])])
                )

    def r_precision(self, pictures: Sequence[Image.Image]) -> float:
        """The share of pictures whose own caption wins, the mean over languages; a tie counts as a miss."""
        images = self.towers.encode_image(list(pictures))
        shares = []
        for known, texts in self.features:
            scores = torch.einsum("ncd,nd->nc", texts, images[known])
            shares.append(float((scores[:, 0] > scores[:, 1:].amax(dim=1)).double().mean()))
        return sum(shares) / len(shares)


@torch.no_grad()
def trunk_features(trunk: Trunk, pictures: Sequence[Image.Image]) -> Tensor:
    """Unit vectors [N, C]: the last map of the pictures at the trunk's own size, averaged over places."""
    side, found = trunk.config.image_size, []
    for start in range(0, len(pictures), BATCH):
        pixels = torch.stack([to_tensor(to_square(image, side)) for image in pictures[start : start + BATCH]])
        found.append(trunk.forward_map(trunk.normalise(pixels)).mean(dim=(2, 3)))
    return F.normalize(torch.cat(found), dim=-1)


def _asked(text: str, parser: argparse.ArgumentParser) -> tuple[str, int]:
    name, _, side = text.rpartition("@")
    if not name or not side.isdigit():
        parser.error(f"{text}: name a tokenizer and the side of its pictures, as in emoji@128")
    return name, int(side)


def _print(record: dict[str, dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in record.values() for name in row))
    width = max(len(key) for key in record)
    print(f"{'':{width}}  " + "  ".join(f"{name:>7}" for name in columns))
    for key, row in record.items():
        print(f"{key:{width}}  " + "  ".join(f"{row.get(name, ''):>{max(7, len(name))}}" for name in columns))


def _save_sheet(rows: list[list[Image.Image]], path: Path) -> None:
    """A row of pictures for each kind, all at the largest side."""
    side = max(row[0].width for row in rows)
    step = max(1, len(rows[0]) // SHOWN)
    sheet = Image.new("RGB", (SHOWN * side, len(rows) * side), "white")
    for line, row in enumerate(rows):
        for column, picture in enumerate(row[::step][:SHOWN]):
            sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (column * side, line * side))
    sheet.save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main()
