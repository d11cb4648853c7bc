"""Towers as judges for `data`, which cannot import them: vectors of pictures, and how well texts fit pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.clean.fit import FitScore
from data.leaks import ImageEmbedder
from retrieval.towers.base import Towers


def image_embedder(towers: Towers) -> ImageEmbedder:
    """Pictures to vectors of unit length, by the image tower."""

    def embed(images: list[Image.Image]) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = towers.encode_image(images).numpy()
        return vectors

    return embed


def fit_score(towers: Towers) -> FitScore:
    """The cosine of each picture and its text, by both towers; a picture that comes several times is encoded once."""

    def score(images: list[Image.Image], texts: list[str]) -> NDArray[np.float32]:
        distinct = {id(image): image for image in images}
        places = {key: place for place, key in enumerate(distinct)}
        pictures = towers.encode_image(list(distinct.values()))[[places[id(image)] for image in images]]
        cosines: NDArray[np.float32] = (pictures * towers.encode_text(texts)).sum(-1).numpy()
        return cosines

    return score
