"""The contrastive objective of towers, for a generator that learns to match texts with pictures.

Shapes: N pictures, M texts, C numbers in a vector.
"""

from __future__ import annotations

from torch import Tensor

from retrieval.evaluation.metrics import ranks, recall_figures
from retrieval.training.objectives import ObjectiveConfig, clip_loss, pair_ids


class ContrastiveMatch:
    """A `generation.training.matching.MatchObjective`: the towers' `clip`, in which one concept is one label."""

    def __init__(self) -> None:
        self.config = ObjectiveConfig()

    def loss(self, images: Tensor, texts: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        """See `retrieval.training.objectives.clip_loss`: vectors of all processes are compared."""
        ids, text_ids = pair_ids(labels, len(texts))
        return clip_loss((images, ids), (texts, text_ids), scale, self.config)

    def recall(self, images: Tensor, texts: Tensor, labels: Tensor) -> dict[str, float]:
        """Recall at 10 in both directions; texts and pictures are as many, in the same order."""
        ways = {"text": (texts, images), "image": (images, texts)}
        found = {way: recall_figures(ranks(*vectors, labels, labels)) for way, vectors in ways.items()}
        return {f"{way}_recall@10": figures["recall@10"] for way, figures in found.items()}
