"""Bits per image token of a model on held-out splits, beside the unigram baseline.

    mmwudao tokenize shards/emoji -o codes/emoji
    python -m bench.quality.held_out_bits --codes codes/emoji [--model emoji] [--dtype int8]

Every picture of the split is used once, with its name and style in a language chosen by its id. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from generation.training.batches import RowMaker, held_out_batches, mean_bits
from generation.training.config import GeneratorDataConfig, GeneratorTrainConfig
from generation.training.pairs import CodedPairs, unigram_bits
from mmwudao.pipeline import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codes", type=Path, required=True)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--pictures", type=int, default=10**9, help="of each split")
    arguments = parser.parse_args()
    pipe = load(arguments.model, device="cpu", dtype=arguments.dtype)
    model, styles = pipe.generator, set(pipe.config.styles)
    train = CodedPairs(arguments.codes, "train")
    others = sorted({sample.family for sample in train.samples if sample.family} - styles)
    train = CodedPairs(arguments.codes, "train", others)
    config = GeneratorTrainConfig(data=GeneratorDataConfig(test_pictures=arguments.pictures))
    maker = RowMaker(pipe.text, model.config, config, pipe.features)
    record: dict[str, dict[str, float]] = {}
    for split in ("test-family", "test-concept"):
        pairs = CodedPairs(arguments.codes, split, others)
        with torch.inference_mode():
            figures = mean_bits(model, held_out_batches(pairs, maker), torch.device("cpu"))
            if pipe.config.describes == "tagged":
                captions = held_out_batches(pairs, maker, "describe")
                figures["caption_bits"] = mean_bits(model, captions, torch.device("cpu"))["text_bits"]
        figures["unigram_bits"] = unigram_bits(train, pairs, model.config.num_image_codes)
        record[split] = {name: round(value, 4) for name, value in figures.items()}
        record[split]["pictures"] = min(len(pairs), arguments.pictures)
    print(f"{'split':14} {'pictures':>8} {'model':>8} {'unigram':>8}  (bits per image token)  captions, bits per piece")
    for split, row in record.items():
        image = f"{row['image_bits']:8.3f} {row['unigram_bits']:8.3f}"
        print(f"{split:14} {row['pictures']:8.0f} {image}  {row.get('caption_bits', float('nan')):32.3f}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
