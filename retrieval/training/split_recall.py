"""Recall on held-out splits, which trainings of towers log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from retrieval.evaluation.metrics import ranks, recall_figures
from retrieval.towers.base import Towers
from retrieval.training.pairs import Pictures, queries_by_language


def measure_split_recall(towers: Towers, pictures: Pictures, batch_size: int = 64) -> dict[str, float]:
    """The figures of `recall_of_vectors` for these towers and pictures."""
    return recall_of_vectors(towers.encode_text, vectors_of_pixels(towers, pictures.pixels, batch_size), pictures)


@torch.no_grad()
def vectors_of_pixels(towers: Towers, pixels: Tensor, batch_size: int = 64) -> Tensor:
    """The unit vectors [N, D] of pictures, uint8 [N, 3, S, S]."""
    return torch.cat([towers.encode_image(towers.normalise(part.float() / 255)) for part in pixels.split(batch_size)])


def recall_of_vectors(
    encode_text: Callable[[list[str]], Tensor], images: Tensor, pictures: Pictures
) -> dict[str, float]:
    """Recall at 1 and 10 and the median rank of both directions, as means over languages; text recall of each language.

    `images` [N, D] are the vectors of `pictures`. For text to image, a query is the name of a concept in one language,
    and any picture of the concept is right. For image to text, the candidates are the names of all concepts in one
    language.
    """
    figures: dict[str, float] = {}
    sums: dict[str, list[float]] = {}
    for language, (names, labels) in queries_by_language(pictures.samples).items():
        with quiet():
            texts = encode_text(names)
        text_to_image = recall_figures(ranks(texts, images, labels, pictures.labels))
        image_to_text = recall_figures(ranks(images, texts, pictures.labels, labels))
        figures[f"text_recall@10/{language}"] = text_to_image["recall@10"]
        for way, measured in (("text", text_to_image), ("image", image_to_text)):
            for name in ("recall@1", "recall@10", "median_rank"):
                sums.setdefault(f"{way}_{name}", []).append(measured[name])
    return figures | {name: sum(values) / len(values) for name, values in sums.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings in `logging`: every step would report the captions that are cut, which is expected."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
