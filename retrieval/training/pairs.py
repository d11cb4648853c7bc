"""Training pairs: pictures in memory (uint8) or streamed, and captions drawn afresh whenever a picture is used."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from data.images import to_square
from data.reading import open_shards
from data.sample import DataError, Sample
from data.styles import draw_text, with_style
from retrieval.evaluation.metrics import concept_label


@dataclass
class PairsConfig:
    """The pictures: a folder of shards (or a brace pattern), and the splits to train and test on."""

    shards: str = "shards"
    train: str = "train"
    test: list[str] = field(default_factory=lambda: ["test-family", "test-concept"])
    exclude_families: list[str] = field(default_factory=list)
    balance: float = 0.0  # weight of a picture: (pictures of its base concept and family) ** -balance
    test_pictures: int = 2000  # at most, of each test split
    # decode every training picture once and keep it as uint8; otherwise stream shards with any number of pictures
    in_memory: bool = True
    shuffle: int = 2000  # pictures in the shuffle buffer when streaming

    def __post_init__(self) -> None:
        if self.balance < 0 or self.test_pictures < 1:
            raise ValueError("balance must be 0 or more, and test_pictures 1 or more")


@dataclass
class RetrievalCaptionConfig:
    """How a caption is drawn: a language, then the name, keywords in random order or both, then perhaps the style."""

    name: float = 0.7  # probability of the name alone
    keywords: float = 0.15  # of some keywords alone; otherwise the name and some keywords
    style: float = 0.2  # probability of naming the family, if the sample has one
    per_picture: int = 1  # captions of a picture in one batch, in different languages as far as possible

    def __post_init__(self) -> None:
        if not all(0 <= p <= 1 for p in (self.name, self.keywords, self.style)) or self.name + self.keywords > 1:
            raise ValueError("name, keywords, style and name + keywords are probabilities from 0 to 1")
        if self.per_picture < 1:
            raise ValueError("per_picture must be at least 1")


@dataclass
class AugmentConfig:
    """Augmentation of training pictures: each change is uniform up to its value in both directions; 0 disables it."""

    shift: float = 0.08  # of the side
    scale: float = 0.15  # logarithm of the factor
    rotation: float = 8.0  # degrees
    brightness: float = 0.15
    contrast: float = 0.2


def draw_captions(sample: Sample, config: RetrievalCaptionConfig, rng: random.Random) -> list[str]:
    """Draw `per_picture` captions of `sample`."""
    known = sorted(sample.captions)
    languages = rng.sample(known, min(config.per_picture, len(known)))
    languages += rng.choices(known, k=config.per_picture - len(languages))
    captions = []
    for language in languages:
        text = draw_text(sample.captions[language], config.name, config.keywords, rng)
        if sample.family and rng.random() < config.style:
            text = with_style(text, sample.family, language)
        captions.append(text)
    return captions


def label_of(sample: Sample) -> int:
    """The label of the sample's concept; a picture without one is a concept of its own."""
    return concept_label(sample.concept if sample.concept else f"picture {sample.id}")


def augment(pixels: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Shift, scale, rotate and recolour pictures [N, 3, S, S] in [0, 1], each independently; edges are repeated."""
    count = len(pixels)

    def spread(width: float) -> Tensor:
        return ((torch.rand(count, generator=generator) * 2 - 1) * width).to(pixels)

    angle = spread(config.rotation) * torch.pi / 180
    # the transform maps positions in the result to positions in the picture, whose side has length 2
    size = torch.exp(spread(config.scale))
    rows = [
        torch.stack([angle.cos() * size, -angle.sin() * size, 2 * spread(config.shift)], dim=1),
        torch.stack([angle.sin() * size, angle.cos() * size, 2 * spread(config.shift)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    contrast, brightness = (1 + spread(config.contrast))[:, None, None, None], spread(config.brightness)
    return ((moved - 0.5) * contrast + 0.5 + brightness[:, None, None, None]).clamp(0, 1)


class Pictures:
    """The samples of a split without their encoded bytes, and their pictures as uint8 [N, 3, S, S]."""

    def __init__(self, config: PairsConfig, split: str, size: int, limit: int | None = None) -> None:
        """Read all pictures, or `limit` of them spread over the split. Raises `DataError` if there is none."""
        pairs = list(stream_pairs(config, split, size, by_node=False))
        if not pairs:
            raise DataError(f"{config.shards} holds no readable {split} pictures of the chosen families")
        if limit is not None and limit < len(pairs):
            pairs = [pairs[k * len(pairs) // limit] for k in range(limit)]
        self.samples = [sample for sample, _ in pairs]
        self.pixels = torch.stack([pixels for _, pixels in pairs])
        self.labels = torch.tensor([label_of(sample) for sample in self.samples])

    def weights(self, balance: float) -> Tensor:
        """Sampling weights of the pictures, float64 [N], not normalised; see `PairsConfig.balance`."""
        keys = [(sample.base_concept or sample.id, sample.family) for sample in self.samples]
        counts = Counter(keys)
        return torch.tensor([counts[key] ** -balance for key in keys], dtype=torch.float64)


def stream_pairs(config: PairsConfig, split: str, size: int, **options: Any) -> Iterator[tuple[Sample, Tensor]]:
    """Samples without their encoded bytes, and their pictures as uint8 [3, S, S]; `options` go to `open_shards`."""
    for sample, image in open_shards(config.shards, split, **options):
        if sample.family not in config.exclude_families:
            sample.image = None
            yield sample, torch.from_numpy(numpy.array(to_square(image, size))).permute(2, 0, 1).contiguous()


def take(stream: Iterator[tuple[Sample, Tensor]], count: int) -> tuple[list[Sample], Tensor]:
    """The next `count` samples and their pictures, uint8 [count, 3, S, S]."""
    pairs = list(islice(stream, count))
    return [sample for sample, _ in pairs], torch.stack([pixels for _, pixels in pairs])


def queries_by_language(samples: Sequence[Sample]) -> dict[str, tuple[list[str], Tensor]]:
    """Language -> the names of the concepts, each concept once, and their labels."""
    queries: dict[str, dict[int, str]] = {}
    for sample in samples:
        for language, caption in sample.captions.items():
            queries.setdefault(language, {}).setdefault(label_of(sample), caption.name)
    return {language: (list(names.values()), torch.tensor(list(names))) for language, names in sorted(queries.items())}
