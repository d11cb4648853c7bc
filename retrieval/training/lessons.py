"""Knowledge inheritance for towers that start at random: a trained text encoder says which texts are alike.

As in CPM-2 (Zhang et al. 2021, arXiv:2106.10715, section 2.2) a small trained model teaches a new one; here by the
similarities of texts among each other (SEED, Fang et al. 2021, arXiv:2101.04731, eq. 2), so that the two need no common
width, and the new towers no part that is thrown away later.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from data.config import ConfigError
from data.options import check_options, option
from retrieval.encoders.text_encoder import load_text_encoder
from retrieval.towers.base import Tokens, Towers, to_device
from retrieval.training.inherit import TextVectors
from retrieval.training.train_text_encoder import read_texts


@dataclass
class InheritConfig:
    """What towers of any kind learn from a trained text encoder, beside the pairs."""

    text: str = option("", "The folder of a text encoder (`mmwudao import text-encoder`) to learn from; empty: none.")
    texts: list[str] = field(default_factory=list)  # more texts to learn on, in files of UTF-8, one a line
    weight: float = option(1.0, "Weight of this lesson beside the loss of the pairs.", least=0, most=1e6)
    temperature: float = option(
        0.1, "Divides the cosines of both before the softmax: low minds the nearest texts alone.", above=0, most=1e6
    )
    batch: int = option(256, "Texts of a lesson, in each step and process.", least=2, most=2**16)

    def __post_init__(self) -> None:
        check_options(self)


class Lesson(NamedTuple):
    """Tokens of N texts, and the teacher's vectors of them [N, width], of unit length and centred."""

    tokens: Tokens
    vectors: Tensor
    config: InheritConfig

    def __call__(self, towers: Towers) -> Tensor:
        """The loss of `towers`, a scalar."""
        device = towers.device
        texts = towers.encode_tokens(to_device(self.tokens, device))
        with torch.autocast(device.type, enabled=False):
            loss = lesson_loss(texts, self.vectors.to(device), self.config.temperature)
        return self.config.weight * loss


class Lessons:
    """Texts and what the teacher makes of them, drawn by a seed."""

    def __init__(self, config: InheritConfig, towers: Towers, texts: Sequence[str], file: Path) -> None:
        """Of `texts` and those of `config.texts`; vectors are kept in `file`. Raises `ConfigError`, `ModelError`."""
        self.config, self.towers = config, towers
        more = read_texts(config.texts) if config.texts else []
        self.texts = list(dict.fromkeys([*texts, *more]))
        if len(self.texts) < 2:
            raise ConfigError("inherit needs texts: of pictures in memory (data.in_memory), or files in inherit.texts")
        vectors = TextVectors.prepare(load_text_encoder(Path(config.text)), self.texts, file).vectors.float()
        # the vectors of E5 lie in one narrow cone: only what they have not in common tells texts apart
        self.vectors = F.normalize(vectors - vectors.mean(dim=0), dim=1).half()

    def __call__(self, seed: str) -> Lesson:
        rows = random.Random(seed).sample(range(len(self.texts)), min(self.config.batch, len(self.texts)))
        return Lesson(self.towers.tokenize([self.texts[row] for row in rows]), self.vectors[rows].float(), self.config)


def lesson_loss(texts: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The divergence of each text's similarities [N, D] to the others from those that the teacher sees [N, width]."""
    own, wanted = texts.float() @ texts.float().T / temperature, teacher @ teacher.T / temperature
    itself = torch.eye(len(own), dtype=torch.bool, device=own.device)
    own, wanted = (part[~itself].view(len(part), -1).log_softmax(dim=1) for part in (own, wanted))
    return F.kl_div(own, wanted, log_target=True, reduction="batchmean")
