"""Locked-image tuning: a text encoder learns to find pictures whose vectors stay as they are.

Zhai et al. 2022 (arXiv:2111.07991), section 3: the image tower is locked, the text tower is tuned. Picture vectors are
computed once, so that a step costs texts alone, and a text is compared with thousands of pictures.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.config import ConfigError
from data.options import check_options, option
from retrieval.encoders.text_encoder import TextEncoder
from retrieval.towers.base import load_towers, unit
from retrieval.towers.pretrained import PretrainedTowers
from retrieval.training.inherit import name_label, read_cache, texts_of, write_cache
from retrieval.training.objectives import ObjectiveConfig, cross_entropy, pairs
from retrieval.training.pairs import (
    AugmentConfig,
    PairsConfig,
    Pictures,
    RetrievalCaptionConfig,
    augment,
    draw_captions,
    mirror,
)
from retrieval.training.split_recall import quiet, recall_of_vectors, vectors_of_pixels
from vqvae.storage.parts import content_hash
from vqvae.training.process import replica, replicas

log = logging.getLogger(__name__)


@dataclass
class LockedImageConfig:
    """Towers that a student of their text encoder's teacher learns to find pictures by."""

    towers: str = option("", "Trained towers on encoders: the student takes the place of their text encoder.")
    data: PairsConfig = field(default_factory=PairsConfig)
    captions: RetrievalCaptionConfig = field(default_factory=RetrievalCaptionConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    views: int = option(
        2, "Vectors of each picture: one of it as it is, the others of augmented copies.", least=1, most=100
    )
    batch: int = option(192, "Captions in a step, one of each picture, over all processes.", least=2, most=2**16)
    candidates: int = option(
        8192, "Other pictures that each caption of a step is compared with.", least=0, most=2**20
    )
    weight: float = option(0.2, "Weight of finding pictures, beside the distance from the teacher.", least=0, most=1e6)

    def __post_init__(self) -> None:
        check_options(self)


class CaptionBatch(NamedTuple):
    """Tokens of N captions, the vectors [N, D] and labels [N] of their pictures, and those of C other pictures."""

    tokens: Tensor
    images: Tensor
    labels: Tensor
    other_images: Tensor
    other_labels: Tensor

    def to(self, device: torch.device) -> CaptionBatch:
        return CaptionBatch(*(tensor.to(device) for tensor in self))


class PictureBank:
    """The training pictures of locked towers, as vectors float16 [views, P, D], and the captions to find them by."""

    def __init__(self, config: LockedImageConfig, file: Path) -> None:
        """Vectors are kept in `file`. Raises `ConfigError` for towers of another kind, `ModelError`, `DataError`."""
        self.config = config
        towers = load_towers(config.towers)
        if not isinstance(towers, PretrainedTowers):
            raise ConfigError(
                f"locked_image.towers={config.towers} are of the kind {towers.kind}; only towers that "
                "train retrieval made with init have a text encoder that a student can replace"
            )
        self.towers: PretrainedTowers = towers
        pictures = Pictures(config.data, config.data.train, towers.image_size)
        if config.batch > len(pictures.samples):
            raise ConfigError(f"locked_image.batch={config.batch} exceeds the {len(pictures.samples)} pictures")
        self.samples, self.weights = pictures.samples, pictures.weights(config.data.balance)
        self.labels = torch.tensor([name_label(sample) for sample in pictures.samples])
        self.vectors = self._prepare(pictures, file)
        self.tests = {
            split: Pictures(config.data, split, towers.image_size, config.data.test_pictures)
            for split in config.data.test
        }
        self.test_vectors = {split: vectors_of_pixels(towers, part.pixels) for split, part in self.tests.items()}

    def texts(self) -> list[str]:
        """The names and single keywords of the pictures."""
        return texts_of(self.samples)

    def draw(self, student: TextEncoder, seed: str) -> CaptionBatch:
        """Captions and candidates drawn by `seed`; this process's share of both."""
        rng, generator = random.Random(seed), torch.Generator().manual_seed(random.Random(seed).getrandbits(62))
        count, others = self.config.batch, min(self.config.candidates, len(self.samples))
        own = torch.multinomial(self.weights, count, generator=generator)[replica() :: replicas()]
        other = torch.randperm(len(self.samples), generator=generator)[:others]
        captions = [draw_captions(self.samples[index], self.config.captions, rng)[0] for index in own.tolist()]
        with quiet():
            tokens = student.tokenize(captions)
        views = torch.randint(len(self.vectors), (len(own) + others,), generator=generator)
        images, other_images = (
            self.vectors[view, rows].float() for view, rows in ((views[: len(own)], own), (views[len(own) :], other))
        )
        return CaptionBatch(tokens, images, self.labels[own], other_images, self.labels[other])

    def measure(self, finder: PictureFinder, student: TextEncoder) -> dict[str, float]:
        """Recall on the test splits, as `train retrieval` logs it."""
        figures: dict[str, float] = {}
        for split, pictures in self.tests.items():
            found = recall_of_vectors(
                lambda names: finder.vectors(student.encode(names)), self.test_vectors[split], pictures
            )
            figures |= {f"{split}/{name}": value for name, value in found.items()}
        return figures

    def _prepare(self, pictures: Pictures, file: Path) -> Tensor:
        config, towers = self.config, self.towers
        key = sha256(pictures.pixels.numpy().data, usedforsecurity=False).hexdigest()
        key = f"{key} {content_hash(towers)} {config.views} {config.augment}"
        stored = read_cache(file, key)
        if stored is None:
            log.info("computing the vectors of %d pictures, %d of each", len(pictures.samples), config.views)
            parts = [vectors_of_pixels(towers, pictures.pixels).half()]
            for view in range(1, config.views):
                rng, generator = random.Random(view), torch.Generator().manual_seed(view)
                copies = mirror(pictures.pixels, pictures.samples, config.augment.mirror, rng)
                moved = [
                    (augment(part.float() / 255, config.augment, generator) * 255).round().byte()
                    for part in copies.split(256)
                ]
                parts.append(vectors_of_pixels(towers, torch.cat(moved)).half())
            stored = {"vectors": torch.stack(parts)}
            write_cache(file, key, stored)
        return stored["vectors"]


class PictureFinder(nn.Module):
    """The text head of locked towers, and the loss of finding pictures by captions."""

    def __init__(self, towers: PretrainedTowers) -> None:
        super().__init__()
        self.text_head = towers.text_head
        self.register_buffer("scale", towers.scale.detach().clone())
        self.objective = ObjectiveConfig()

    def vectors(self, encoded: Tensor) -> Tensor:
        """Unit vectors of the text encoder [N, width] -> unit vectors in the space of the pictures [N, D]."""
        return unit(self.text_head(encoded))

    def forward(self, encoded: Tensor, batch: CaptionBatch) -> Tensor:
        """The loss of captions with vectors `encoded` [N, width], a scalar: CLIP's, where pictures of one name are one.

        A caption looks for its pictures among those of all captions and the others; a picture looks for its captions
        among those of the batch.
        """
        texts = F.normalize(self.vectors(encoded).float(), dim=1)
        pair = torch.arange(len(texts), device=texts.device)
        ids = torch.stack([pair, batch.labels], dim=1)
        other_ids = torch.stack([torch.full_like(batch.other_labels, -1), batch.other_labels], dim=1)
        candidates, candidate_ids = torch.cat([batch.images, batch.other_images]), torch.cat([ids, other_ids])
        scale = self.get_buffer("scale")
        found = cross_entropy(scale * texts @ candidates.T, *pairs(ids, candidate_ids, self.objective))
        named = cross_entropy(scale * batch.images @ texts.T, *pairs(ids, ids, self.objective))
        return (found + named) / 2


def tuned_towers(towers: PretrainedTowers, student: TextEncoder, finder: PictureFinder) -> PretrainedTowers:
    """Copies of `towers` that read texts by `student` and the head of `finder`; pictures keep their vectors."""
    tuned = towers.with_text_encoder(student)
    tuned.text_head.load_state_dict(finder.text_head.state_dict())
    return tuned
