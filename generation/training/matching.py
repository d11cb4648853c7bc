"""Learning to match texts with pictures: the settings, and what the contrastive objective must be.

The objective is given by the caller, who may import it from where towers are trained: generation does not.
Shapes: N pictures, M = V N texts (the first of every picture, then the second, ...), C numbers in a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from data.options import check_options, option
from generation.rows.row import RowBatch
from generation.transformer.model import Transformer


@dataclass
class MatchTraining:
    """How rows of the kind match are trained."""

    texts: int = option(2, "Captions of a picture in a row that is matched.", least=1, most=64)
    batch: int = option(
        1, "A step that matches takes so many times the pictures of another: more are harder to tell apart.",
        least=1, most=1024,
    )  # fmt: skip
    temperature: float | None = option(
        None, "The temperature at the start; by default 0.07, or that of the model in start_from.", above=0, most=1e6
    )
    learn_temperature: bool = True

    def __post_init__(self) -> None:
        check_options(self)


class MatchObjective(Protocol):
    """A contrastive objective: pictures and texts of one label belong together."""

    def loss(self, images: Tensor, texts: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        """The loss of vectors [N, C] and [M, C] of length 1, a scalar; its mean over processes is the whole batch's.

        `labels` [N] are those of the pictures; similarities are multiplied by `scale`.
        """

    def recall(self, images: Tensor, texts: Tensor, labels: Tensor) -> dict[str, float]:
        """Figures for the log, of all pictures of a split and one text of each."""


def prepare_head(model: Transformer, settings: MatchTraining) -> None:
    """Give the head of `model`, if it has one, the temperature of `settings`, and fix it if they say so."""
    if model.config.match.used:
        if settings.temperature is not None:
            model.match_head.set_temperature(settings.temperature)
        model.match_head.logit_scale.requires_grad_(settings.learn_temperature)


def match_figures(
    model: Transformer, batches: Sequence[RowBatch], objective: MatchObjective, device: torch.device
) -> dict[str, float]:
    """What `objective` says of `model` on the held-out `batches`."""
    found = [model.match(batch.to(device)) for batch in batches]
    images, texts = (torch.cat(vectors).cpu() for vectors in zip(*found, strict=True))
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    return objective.recall(images, texts, labels)
