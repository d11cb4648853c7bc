"""Bits per image token on a family's held-out pictures, without and with adapters that learned its style.

    mmwudao train style mmwudao/configs/emoji-style.yaml adapter.method=lora loop.out=runs/style-lora
    python -m bench.quality.style_bits --codes codes/emoji runs/style-lora/adapter [ADAPTER...] [--model emoji]

Every picture is used once, with its name in a language chosen by its id and without the family. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from generation.training.batches import mean_bits
from generation.training.train_style import StyleBase, StyleTrainConfig, style_batches
from generation.transformer.adapters import read_adapter
from mmwudao.pipeline import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapters", type=Path, nargs="+")
    parser.add_argument("--codes", required=True)
    parser.add_argument("--model", default="emoji")
    arguments = parser.parse_args()
    read = [read_adapter(folder) for folder in arguments.adapters]
    family = read[0][0].style
    if any(config.style != family for config, _ in read):
        parser.error("the adapters must be of one style")
    config = StyleTrainConfig(arguments.model, arguments.codes, family, test_pictures=10**9)
    names = ["none", *(adapter.method for adapter, _ in read)]
    sizes = [0, *(sum(tensor.numel() for tensor in tensors.values()) for _, tensors in read)]
    record = []
    for folder, name, size in zip([None, *arguments.adapters], names, sizes, strict=True):
        pipe = load(arguments.model, device="cpu", dtype="float32", adapter=folder)
        base = StyleBase(pipe.generator, pipe.text, pipe.config.parts["generator"].hash, pipe.features)
        row: dict[str, float | str] = {"adapter": str(folder or ""), "method": name, "stored": size}
        with torch.inference_mode():
            for split, batches in style_batches(config, base).items():
                row[split] = round(mean_bits(pipe.generator, batches, pipe.device)["image_bits"], 4)
        record.append(row)
    print(f"| {family} | parameters stored | {' | '.join(config.test)} |")
    print("|---|---|" + "---|" * len(config.test))
    for row in record:
        print(f"| {row['method']} | {row['stored']:,} | {' | '.join(f'{row[split]:.3f}' for split in config.test)} |")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
