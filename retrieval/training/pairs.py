"""Training pairs: pictures held as uint8 or streamed, and captions drawn anew each time a picture is used."""

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
    """Which pictures: a folder of shards (or a pattern) and the splits to train and test on."""

    shards: str = "shards"
    train: str = "train"
    test: list[str] = field(default_factory=lambda: ["test-family", "test-concept"])
    exclude_families: list[str] = field(default_factory=list)
    balance: float = 0.0  # draw a picture by (pictures of its base concept and family) ** -balance
    test_pictures: int = 2000  # of each test split, at most
    # decode every training picture once and keep it as uint8; else shards are streamed (any number of pictures)
    in_memory: bool = True
    shuffle: int = 2000  # pictures in the shuffle buffer when streaming

    def __post_init__(self) -> None:
        if self.balance < 0 or self.test_pictures < 1:
            raise ValueError("balance is 0 or more, test_pictures 1 or more")


@dataclass
class RetrievalCaptionConfig:
    """How a caption is drawn: a language, then name, keywords (in random order) or both, then perhaps the style."""

    name: float = 0.7  # probability of the name alone
    keywords: float = 0.15  # of a random part of the keywords alone; the rest is the name and some keywords
    style: float = 0.2  # of naming the family, where there is one
    per_picture: int = 1  # captions of a picture in one batch, in other languages where there are others

    def __post_init__(self) -> None:
        if not all(0 <= p <= 1 for p in (self.name, self.keywords, self.style)) or self.name + self.keywords > 1:
            raise ValueError("caption probabilities lie in 0..1, name + keywords too")
        if self.per_picture < 1:
            raise ValueError("per_picture is at least 1")


@dataclass
class AugmentConfig:
    """Changes to a training picture, each drawn evenly up to the value given; 0 switches one off."""

    shift: float = 0.08  # of the side
    scale: float = 0.15  # larger or smaller by that factor
    rotation: float = 8.0  # degrees
    brightness: float = 0.15
    contrast: float = 0.2


def draw_captions(sample: Sample, config: RetrievalCaptionConfig, rng: random.Random) -> list[str]:
    """`per_picture` captions of `sample`."""
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
    """The number of the sample's concept; a picture without one shows a thing of its own."""
    return concept_label(sample.concept if sample.concept else f"picture {sample.id}")


def augment(pixels: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Move, scale, turn and recolour pictures [N, 3, S, S] in [0, 1], each its own way; borders are repeated."""
    count = len(pixels)

    def spread(width: float) -> Tensor:
        return ((torch.rand(count, generator=generator) * 2 - 1) * width).to(pixels)

    angle = spread(config.rotation) * torch.pi / 180
    # the transform maps places of the result to places of the picture, whose side is 2 here
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
    """The samples of a split, without their encoded bytes, and their pictures: uint8 [N, 3, S, S]."""

    def __init__(self, config: PairsConfig, split: str, size: int, limit: int | None = None) -> None:
        """Every picture, or `limit` of them spread over the split. Raises `DataError` when there is none."""
        found = list(stream_pairs(config, split, size, by_node=False))
        if not found:
            raise DataError(f"{config.shards} holds no readable {split} pictures of the chosen families")
        if limit is not None and limit < len(found):
            found = [found[k * len(found) // limit] for k in range(limit)]
        self.samples = [sample for sample, _ in found]
        self.pixels = torch.stack([pixels for _, pixels in found])
        self.labels = torch.tensor([label_of(sample) for sample in self.samples])

    def weights(self, balance: float) -> Tensor:
        """How often to draw each picture, float64 [N], not normalised; see `PairsConfig.balance`."""
        keys = [(sample.base_concept or sample.id, sample.family) for sample in self.samples]
        counts = Counter(keys)
        return torch.tensor([counts[key] ** -balance for key in keys], dtype=torch.float64)


def stream_pairs(config: PairsConfig, split: str, size: int, **options: Any) -> Iterator[tuple[Sample, Tensor]]:
    """Samples, their encoded bytes dropped, with their pictures as uint8 [3, S, S]."""
    for sample, image in open_shards(config.shards, split, **options):
        if sample.family not in config.exclude_families:
            sample.image = b""
            yield sample, torch.from_numpy(numpy.array(to_square(image, size))).permute(2, 0, 1).contiguous()


def take(stream: Iterator[tuple[Sample, Tensor]], count: int) -> tuple[list[Sample], Tensor]:
    """The next `count` samples and their pictures, uint8 [count, 3, S, S]."""
    found = list(islice(stream, count))
    return [sample for sample, _ in found], torch.stack([pixels for _, pixels in found])


def queries_by_language(samples: Sequence[Sample]) -> dict[str, tuple[list[str], Tensor]]:
    """Of each language the names of the concepts, every concept once, and their labels."""
    queries: dict[str, dict[int, str]] = {}
    for sample in samples:
        for language, caption in sample.captions.items():
            queries.setdefault(language, {}).setdefault(label_of(sample), caption.name)
    return {language: (list(names.values()), torch.tensor(list(names))) for language, names in sorted(queries.items())}
