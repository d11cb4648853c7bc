"""Training pairs: the codes of pictures, and a caption drawn anew each time a picture is used."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from data.codes import read_codes
from data.sample import DataError, Sample
from data.styles import draw_text, tagged, with_style


@dataclass
class CaptionConfig:
    """How a caption is drawn: a language, then name, keywords (in random order) or both, then perhaps the style."""

    name: float = 0.6  # probability of the name alone
    keywords: float = 0.2  # of a random part of the keywords alone; the rest is the name and some keywords
    style: float = 0.5  # of naming the family, where there is one
    dropout: float = 0.1  # of no caption at all, for classifier-free guidance (Ho and Salimans 2022)
    second: float = 0.0  # of the same in a second language behind it
    image_first: float = 0.0  # of a step whose rows describe pictures, instead of drawing them

    def __post_init__(self) -> None:
        every = (self.name, self.keywords, self.style, self.dropout, self.second, self.image_first)
        if not all(0 <= p <= 1 for p in every):
            raise ValueError("caption probabilities lie in 0..1")
        if self.name + self.keywords > 1:
            raise ValueError("captions.name + captions.keywords must not exceed 1")


def draw_caption(sample: Sample, config: CaptionConfig, rng: random.Random) -> str:
    """A caption of `sample` as `config` says; the empty string for caption dropout."""
    if rng.random() < config.dropout:
        return ""
    language = rng.choice(sorted(sample.captions))
    text = draw_text(sample.captions[language], config.name, config.keywords, rng)
    if config.second and rng.random() < config.second:
        other = rng.choice(sorted(sample.captions))
        text += ", " + draw_text(sample.captions[other], config.name, config.keywords, rng)
    if sample.family and rng.random() < config.style:
        text = with_style(text, sample.family, language)
    return text


def descriptions(sample: Sample) -> list[str]:
    """What is to be told from the picture of `sample`: its name in each language, with the language in front."""
    return [tagged(sample.captions[language].name, language) for language in sorted(sample.captions)]


class CodedPairs:
    """Every coded picture of a split, in memory: a million pictures of 256 codes take a gigabyte.

    `family` takes the pictures of that one alone. `codes` is int32 [P, h, w] (PyTorch can do little with uint16).
    """

    def __init__(
        self, folder: Path, split: str, exclude_families: Sequence[str] = (), family: str | None = None
    ) -> None:
        coded = list(read_codes(folder, split))
        kept = [c for c in coded if c.sample.family not in exclude_families]
        if family is not None:
            kept = [c for c in kept if c.sample.family == family]
        if not kept:
            families = ", ".join(sorted({str(c.sample.family) for c in coded})) or "none"
            wanted = f" ({family})" if family else ""
            raise DataError(
                f"split {split!r} of {folder} holds no pictures of the chosen families{wanted}; it has {families}"
            )
        if len({c.codes.shape for c in kept}) > 1:
            raise DataError(f"the pictures of {folder} differ in size; tokenize them at one size")
        self.samples = [c.sample for c in kept]
        self.codes = torch.stack([torch.from_numpy(c.codes.astype(numpy.int32)) for c in kept])

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in codes."""
        return self.codes.shape[1], self.codes.shape[2]

    def sampling_weights(self, balance: float) -> Tensor:
        """Float64 [P]: (pictures of the same base concept and family) ** -balance, so 0 draws pictures evenly.

        Skin tones and genders multiply some concepts by up to 112; at 1, all of them together count as one picture.
        """
        keys = [(s.base_concept or s.id, s.family) for s in self.samples]
        counts = Counter(keys)
        return torch.tensor([counts[key] ** -balance for key in keys], dtype=torch.float64)

    def histogram(self, num_codes: int) -> Tensor:
        """How often each code occurs, int64 [num_codes]."""
        return torch.bincount(self.codes.flatten().long(), minlength=num_codes)


def unigram_bits(train: CodedPairs, test: CodedPairs, num_codes: int) -> float:
    """Bits per image token of `test` under the code frequencies of `train` (add-one smoothed): the baseline."""
    counts = (train.histogram(num_codes) + 1).double()
    cost = -(counts / counts.sum()).log2()
    return float(cost[test.codes.flatten().long()].mean())
