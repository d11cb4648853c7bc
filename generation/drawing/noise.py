"""The noise of a block of pictures, which decides its codes together with their logits (`generation.drawing.logits`).

A model says which of two kinds draws its pictures, and each kind draws others. "table": all numbers of a picture at
once, before the first step; what our own models, and the first that were imported, draw by. "counter": those of a place
when it is reached, by Philox (Salmon et al. 2011, doi 10.1145/2063384.2063405) with the seed and the place for a key,
so that 8,100 places of 32,768 codes need no gigabytes.

Shapes: m pictures, S codes of a picture, N image codes, W places of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, Protocol

import numpy
import torch
from torch import Tensor

from generation.drawing.logits import draw_noise

NoiseKind = Literal["table", "counter"]
KEPT = 64  # places that are kept by counter noise: a window looks at most of its places again and again


class Noise(Protocol):
    """Standard Gumbel numbers, float32, that belong to the seed and the place."""

    def at(self, place: int) -> Tensor:
        """Those of code number `place` in all pictures: [m, N]."""

    def among(self, places: Tensor) -> Tensor:
        """Those of the codes `places` [m, W] of each picture: [m, W, N]."""


def make_noise(kind: NoiseKind, seeds: Sequence[int], steps: int, num_codes: int, device: torch.device) -> Noise:
    """The noise of pictures with these seeds."""
    made = TableNoise if kind == "table" else CounterNoise
    return made(seeds, steps, num_codes, device)


class TableNoise:
    """[m, S, N] at once; unused rows repeat a picture, so equal seeds are drawn once."""

    def __init__(self, seeds: Sequence[int], steps: int, num_codes: int, device: torch.device) -> None:
        self._table = torch.empty(len(seeds), steps, num_codes, device=device)
        self._images = torch.arange(len(seeds), device=device)[:, None]
        for row, seed in enumerate(seeds):
            first = seeds.index(seed)
            self._table[row] = draw_noise(seed, steps, num_codes) if first == row else self._table[first]

    def at(self, place: int) -> Tensor:
        return self._table[:, place]

    def among(self, places: Tensor) -> Tensor:
        return self._table[self._images, places]


class CounterNoise:
    """Place by place."""

    def __init__(self, seeds: Sequence[int], steps: int, num_codes: int, device: torch.device) -> None:
        self._seeds, self._device = seeds, device
        self._drawn = lru_cache(maxsize=KEPT * len(set(seeds)))(lambda seed, place: place_noise(seed, place, num_codes))

    def at(self, place: int) -> Tensor:
        return torch.stack([self._drawn(seed, place) for seed in self._seeds]).to(self._device)

    def among(self, places: Tensor) -> Tensor:
        rows = zip(self._seeds, places.tolist(), strict=True)
        return torch.stack([torch.stack([self._drawn(seed, one) for one in row]) for seed, row in rows]).to(
            self._device
        )


def place_noise(seed: int, place: int, num_codes: int) -> Tensor:
    """The noise [N] of one place: of the first N numbers of 64 bits that Philox gives for the key (seed, place)."""
    bits = numpy.random.Philox(key=numpy.array([seed, place], dtype=numpy.uint64)).random_raw(num_codes)
    uniforms = torch.from_numpy((bits >> numpy.uint64(11)).astype(numpy.float64) * 2.0**-53)
    # a uniform of exactly 0 (one in 2**53) gives minus infinity: that code is not drawn
    return uniforms.log_().neg_().log_().neg_().float()
