"""Training pairs: pictures in memory (uint8) or streamed, and captions drawn afresh whenever a picture is used."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data.augment import may_be_mirrored
from data.concepts import label_of
from data.config import ConfigError
from data.images import to_square
from data.options import COUNT, check_options, option
from data.reading import expand_shards, open_shards
from data.sample import DataError, Sample
from data.shard_index import ShuffledShards
from data.styles import draw_text, with_style


@dataclass
class PairsConfig:
    """The pictures: a folder of shards (or a brace pattern), and the splits to train and test on."""

    shards: str = "shards"
    also: list[str] = field(default_factory=list)  # folders of further shards, for training alone
    train: str = "train"
    test: list[str] = field(default_factory=lambda: ["test-family", "test-concept"])
    exclude_families: list[str] = field(default_factory=list)
    balance: float = option(
        0.0, "A picture's weight is the count of its base concept's and family's pictures to the power of minus this.",
        least=0, most=10,
    )  # fmt: skip
    test_pictures: int = option(2000, "Evaluate on at most this many pictures of each test split.", least=1, most=COUNT)
    # decode every training picture once and keep it as uint8; otherwise stream shards with any number of pictures
    in_memory: bool = True
    shuffle: int = option(
        2000, "Pictures that are shuffled together when streaming; whole shards.", least=0, most=COUNT
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class RetrievalCaptionConfig:
    """How a caption is drawn: a language, then the name, keywords in random order or both, then perhaps the style."""

    name: float = option(0.7, "Probability of the name alone.", least=0, most=1)
    keywords: float = option(
        0.15, "Probability of some keywords alone; otherwise the name and some keywords.", least=0, most=1
    )
    style: float = option(0.2, "Probability of naming the family, if the sample has one.", least=0, most=1)
    per_picture: int = option(
        1, "Captions of a picture in one batch, in different languages as far as possible.", least=1, most=1000
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.name + self.keywords > 1:
            raise ValueError("name + keywords must not exceed 1: they are probabilities")


@dataclass
class AugmentConfig:
    """Augmentation of training pictures: each change is uniform up to its value in both directions; 0 disables it."""

    shift: float = option(0.08, "Shift, as a share of the side.", least=0, most=1)
    scale: float = option(0.15, "Scale, the logarithm of the factor.", least=0, most=10)
    rotation: float = option(8.0, "Rotation in degrees.", least=0, most=360)
    brightness: float = option(0.15, "Change of brightness, where white is 1.", least=0, most=1)
    contrast: float = option(0.2, "Change of contrast, as a share.", least=0, most=1)
    mirror: float = option(
        0.0, "Probability of a mirror image, unless a name or keyword speaks of direction, writing, figures or a flag.",
        least=0, most=1,
    )  # fmt: skip
    # what pictures go through on their way: without these, nothing is drawn, and batches are what they were
    reconstructed: float = option(
        0.0, "Probability that a tokenizer of `reconstructions` encodes and decodes a picture.", least=0, most=1
    )
    reconstructions: list[str] = field(default_factory=list)  # folders of image tokenizers, which stay as they are
    blur: float = option(0.0, "Probability of a Gaussian blur.", least=0, most=1)
    noise: float = option(0.0, "Probability of Gaussian noise.", least=0, most=1)
    jpeg: float = option(0.0, "Probability of JPEG compression.", least=0, most=1)

    def __post_init__(self) -> None:
        check_options(self)
        if self.reconstructed and not self.reconstructions:
            raise ConfigError("augment.reconstructed needs augment.reconstructions, folders of image tokenizers")


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


def mirror(pixels: Tensor, samples: Sequence[Sample], probability: float, rng: random.Random) -> Tensor:
    """Pictures [N, 3, S, S], of which those that may be (`may_be_mirrored`) are mirrored with this probability."""
    if not probability:
        return pixels
    chosen = torch.tensor([rng.random() < probability and may_be_mirrored(sample) for sample in samples])
    return torch.where(chosen[:, None, None, None], pixels.flip(3), pixels)


class Pictures:
    """The samples of a split without their encoded bytes, and their pictures as uint8 [N, 3, S, S]."""

    def __init__(self, config: PairsConfig, split: str, size: int, limit: int | None = None) -> None:
        """Read all pictures, or `limit` of them spread over the split. Raises `DataError` if there is none."""
        pairs = list(stream_pairs(config, split, size, by_node=False))
        if split == config.train:
            for folder in config.also:
                pairs += stream_pairs(replace(config, shards=folder), split, size, by_node=False)
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
            yield _decoded(sample, image, size)


class StreamedPairs:
    """The training pictures of shards of any size, by their place in an order that the seed decides."""

    def __init__(self, config: PairsConfig, size: int, seed: int) -> None:
        self.size = size
        self.shards = ShuffledShards(
            expand_shards(config.shards, config.train), shuffle=config.shuffle, seed=seed,
            exclude_families=config.exclude_families,
        )  # fmt: skip

    def take(self, positions: Sequence[int]) -> tuple[list[Sample], Tensor]:
        """The samples at these places without their encoded bytes, and their pictures, uint8 [n, 3, S, S]."""
        pairs = [_decoded(*self.shards.at(position), self.size) for position in positions]
        return [sample for sample, _ in pairs], torch.stack([pixels for _, pixels in pairs])


def _decoded(sample: Sample, image: Image.Image, size: int) -> tuple[Sample, Tensor]:
    sample.image = None
    return sample, torch.from_numpy(numpy.array(to_square(image, size))).permute(2, 0, 1).contiguous()


def queries_by_language(samples: Sequence[Sample]) -> dict[str, tuple[list[str], Tensor]]:
    """Language -> the names of the concepts, each concept once, and their labels."""
    queries: dict[str, dict[int, str]] = {}
    for sample in samples:
        for language, caption in sample.captions.items():
            queries.setdefault(language, {}).setdefault(label_of(sample), caption.name)
    return {language: (list(names.values()), torch.tensor(list(names))) for language, names in sorted(queries.items())}
