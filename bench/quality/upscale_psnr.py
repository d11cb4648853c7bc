"""Enlarging measured.

    python -m bench.quality.upscale_psnr MODEL SHARDS256 --split test-family --sheet docs/upscale.webp

Mean PSNR and SSIM of the model's upscaler, bicubic and Lanczos (Pillow) against the pictures of SHARDS256, from the
same pictures at half the size: scaled down, and scaled down and then coded and decoded by the image tokenizer, as
drawn pictures are. MODEL is a model directory, or the folder of a trained upscaler (then --tokenizer names the
model whose tokenizer decodes). The last line is JSON. The sheet shows the first pictures of different concepts: scaled
down, bicubic, ours, the original.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.images import to_square, to_tensor
from data.reading import open_shards
from mmwudao.loading.model_dir import find_model, load_tokenizer, read_model_config
from vqvae.psnr import psnr
from vqvae.storage.parts import load_part
from vqvae.tokenize import tensor_to_image
from vqvae.upscaler import SCALE, Upscaler

LOST = ["fxemoji", "streamline-emojis"]  # families that no part was trained on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("shards", type=Path)
    parser.add_argument("--split", default="test-family")
    parser.add_argument("--tokenizer", help="default: MODEL's")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--rows", type=int, default=10, help="of the sheet")
    arguments = parser.parse_args()
    upscaler = _upscaler(arguments.model)
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model).float()
    figures: dict[str, list[tuple[float, float]]] = {}
    rows: list[list[Image.Image]] = []
    seen: set[str | None] = set()
    examples = ((s, image) for s, image in open_shards(arguments.shards, arguments.split) if s.family not in LOST)
    for sample, large in islice(examples, arguments.pictures):
        width, height = large.size
        small = to_square(large, width // SCALE)
        pixels = to_tensor(small)[None]
        decoded = tensor_to_image(tokenizer.decode(tokenizer.encode(pixels))[0])
        new = sample.base_concept not in seen and len(rows) < arguments.rows
        for kind, image in (("scaled down", small), ("decoded", decoded)):
            made = {
                "ours": tensor_to_image(upscaler.enlarge(to_tensor(image)[None])[0]),
                "bicubic": image.resize((width, height), Image.Resampling.BICUBIC),
                "lanczos": image.resize((width, height), Image.Resampling.LANCZOS),
            }
            for method, picture in made.items():
                figures.setdefault(f"{kind}, {method}", []).append(compare(picture, large))
            if new and kind == "scaled down":
                shown = image.resize((width, height), Image.Resampling.NEAREST)
                rows.append([shown, made["bicubic"], made["ours"], large])
        seen.add(sample.base_concept)
    means = {name: tuple(numpy.mean(values, axis=0).tolist()) for name, values in figures.items()}
    for name, (ratio, ssim) in means.items():
        print(f"{name:<22} PSNR {ratio:6.2f} dB   SSIM {ssim:.4f}")
    for kind in ("scaled down", "decoded"):
        winner = max(("ours", "bicubic", "lanczos"), key=lambda method: means[f"{kind}, {method}"][0])
        print(f"{kind}: {winner} wins by PSNR")
    if arguments.sheet:
        _save_sheet(rows, arguments.sheet)
    count = len(next(iter(figures.values()), []))
    print(json.dumps({"split": arguments.split, "pictures": count, "psnr_ssim": means}))


def compare(made: Image.Image, expected: Image.Image) -> tuple[float, float]:
    """PSNR in dB over all channels, and SSIM of the luma (Wang et al. 2004: 11x11 Gaussian, sigma 1.5)."""
    first, second = to_tensor(made), to_tensor(expected)
    return float(psnr(first[None], second[None])[0]), structural_similarity(_luma(first), _luma(second))


def structural_similarity(first: Tensor, second: Tensor) -> float:
    """SSIM of two pictures [H, W] in [0, 1], the mean over windows that lie inside (Wang et al. 2004, eq. 13)."""
    places = torch.arange(11) - 5.0
    line = torch.exp(-(places**2) / (2 * 1.5**2))
    line = line / line.sum()

    def blur(picture: Tensor) -> Tensor:
        rows = F.conv2d(picture[None, None], line.view(1, 1, 1, 11))
        return F.conv2d(rows, line.view(1, 1, 11, 1))[0, 0]

    mean, other = blur(first), blur(second)
    variance, variance_other = blur(first**2) - mean**2, blur(second**2) - other**2
    covariance = blur(first * second) - mean * other
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean * other + c1) * (2 * covariance + c2)
    return float((score / ((mean**2 + other**2 + c1) * (variance + variance_other + c2))).mean())


def _luma(pixels: Tensor) -> Tensor:
    return (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=0)


def _upscaler(model: str) -> Upscaler:
    if (Path(model) / "model.safetensors").exists():
        return load_part(Upscaler, model).float()
    folder = find_model(model)
    part = read_model_config(folder).parts.get("upscaler")
    if part is None:
        raise ValueError(f"{model} has no upscaler")
    return load_part(Upscaler, folder / part.path).float()


def _save_sheet(rows: list[list[Image.Image]], path: Path) -> None:
    """Five pictures a column pair: ten rows of four would be a tower."""
    side = rows[0][0].width
    half = (len(rows) + 1) // 2
    sheet = Image.new("RGB", (8 * side, half * side), "white")
    for k, row in enumerate(rows):
        for column, picture in enumerate(row):
            sheet.paste(picture, ((4 * (k // half) + column) * side, k % half * side))
    # 256 colours: every original here has fewer tones than a photograph, and the file is a quarter as large
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main()
