"""Vectors of frozen towers in the prompt of a row.

Text learned from scratch is a bottleneck where captions are few, and a text tower has learned it already. Its vector of
the prompt goes through one linear map and is added at [ROI1], as unCLIP adds CLIP's (Ramesh et al. 2022,
arXiv:2204.06125, section 2.1). A row without a prompt, as guidance needs, has a vector of zeros, to which nothing is
added. A generator that draws from pictures' vectors reads the picture's own before it describes one, too.

In LlamaGen (Sun et al. 2024, arXiv:2406.06525, section 3.2) such vectors are the whole prompt: those of a text encoder,
one for each of its pieces, stand where text pieces stand elsewhere (`PrefixMap`).

Shapes: F vectors, C numbers in a vector, D width, B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.options import WIDTH, check_options, option

INITIAL_DEVIATION = 0.3  # of the map's numbers, and so of what a vector of unit length adds


@dataclass
class PromptFeatures:
    """Which vectors of frozen towers the prompt holds. Width and hash are filled in from the vectors of the training.

    `towers_hash` names the towers by the content hash of their stored weights (`vqvae.storage.parts.stored_hash`).
    """

    # text: the text tower's vector of what is shown; both: the image tower's vector of a picture, too, to draw and to
    # describe
    kind: Literal["none", "text", "both"] = "none"
    width: int = option(0, "Numbers in a vector.", least=0, most=WIDTH)
    towers_hash: str = ""

    def __post_init__(self) -> None:
        check_options(self)
        if self.kind not in ("none", "text", "both"):
            raise ValueError("prompt_features.kind must be none, text or both")

    @property
    def used(self) -> bool:
        """Whether there are such vectors."""
        return self.kind != "none"


class FeatureMap(nn.Module):
    """The linear map of the vectors."""

    mark: ClassVar[str] = "[ROI1]"  # the command at whose places vectors are added

    def __init__(self, features: PromptFeatures, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, features.width))

    def initialise(self) -> None:
        """Give it random weights."""
        nn.init.normal_(self.weight, std=INITIAL_DEVIATION)

    def forward(self, x: Tensor, marked: Tensor, features: Tensor) -> Tensor:
        """x [B, T, D] with `features` [..., C], F in all, added at the F places where `marked` [B, T] is true."""
        vectors = features.flatten(0, -2).to(self.weight.dtype)
        # outside of training one by one: a product of many may add up in another order, and a row must not depend on
        # what stands beside it
        parts = [vectors] if self.training else vectors.split(1)
        return _added(x, marked, torch.cat([F.linear(part, self.weight) for part in parts]))


class PrefixMap(nn.Module):
    """Two linear maps with GELU (tanh) between, of vectors that are the prompt; the command there has no vector."""

    mark: ClassVar[str] = "[ENC]"

    def __init__(self, vector_width: int, width: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(width, vector_width))
        self.second = nn.Parameter(torch.empty(width, width))

    def initialise(self) -> None:
        """Give it random weights."""
        for weight in (self.first, self.second):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: Tensor, marked: Tensor, features: Tensor) -> Tensor:
        """As `FeatureMap.forward`."""
        vectors = features.flatten(0, -2).to(self.first.dtype)
        return _added(x, marked, torch.cat([project_prompt(one, self.first, self.second) for one in vectors.split(1)]))


def project_prompt(vectors: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """What `PrefixMap` makes of vectors [F, C] by its matrices [D, C] and [D, D]: [F, D]."""
    return F.linear(F.gelu(F.linear(vectors, first), approximate="tanh"), second)


def _added(x: Tensor, marked: Tensor, mapped: Tensor) -> Tensor:
    places = marked.flatten().nonzero()[:, 0]
    assert len(places) == len(mapped), f"{len(mapped)} vectors for {len(places)} places"
    return x.flatten(0, 1).index_add(0, places, mapped.to(x.dtype)).view_as(x)
