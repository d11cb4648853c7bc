"""How much a generator uses the text: `python -m bench.quality.text_use --codes codes/emoji [--model emoji]`.

Bits per image token with the picture's own name and style, with those of another picture, and without text; first as
in drawing, then with every given code hidden behind [MASK], where text and place are all there is. The gain is what
the right text saves against none, in bits a picture. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch

from data.styles import with_style
from generation.rows.draw import training_row
from generation.rows.noise import with_noise
from generation.rows.row import collate
from generation.training.pairs import CodedPairs
from mmwudao.pipeline import load

SHIFT = 7  # the other picture is that many further on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codes", type=Path, required=True)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--pictures", type=int, default=96, help="of each split")
    arguments = parser.parse_args()
    pipe = load(arguments.model, device="cpu", dtype="float32")
    model, vocab = pipe.generator, pipe.generator.config.vocabulary
    hidden = torch.full(pipe.grid, vocab.command("[MASK]"))
    record: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'split':14} {'codes':7} {'right':>7} {'other':>7} {'none':>7} {'gain':>7}")
    for split in ("train", "test-family", "test-concept"):
        pairs = CodedPairs(arguments.codes, split)
        known = [i for i, sample in enumerate(pairs.samples) if sample.family in pipe.config.styles]
        chosen = random.Random(0).sample(known, min(arguments.pictures, len(known)))
        captions = []
        for sample in (pairs.samples[i] for i in chosen):
            language = random.Random(sample.id).choice(sorted(sample.captions))
            captions.append(with_style(sample.captions[language].name, sample.family or "", language))
        texts = {"right": captions, "other": captions[SHIFT:] + captions[:SHIFT], "none": [""] * len(captions)}
        record[split] = {}
        for kind, share in (("given", 0.0), ("hidden", 1.0)):
            row = {}
            for name, lines in texts.items():
                total = 0.0
                for i, line in zip(chosen, lines, strict=True):
                    ids = pipe.text.encode(line) if line else []
                    clean = training_row(vocab, ids, pairs.codes[i], model.config.max_text, model.config.position_kind)
                    noisy = with_noise(clean, hidden, share, torch.Generator())
                    with torch.inference_mode():
                        total += float(model.loss(collate(vocab, [noisy]))["image_bits"])
                row[name] = round(total / len(chosen), 4)
            row["gain"] = round((row["none"] - row["right"]) * pairs.codes[0].numel(), 1)
            record[split][kind] = row
            figures = " ".join(f"{row[name]:7.3f}" for name in texts)
            print(f"{split:14} {kind:7} {figures} {row['gain']:7.1f}", flush=True)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
