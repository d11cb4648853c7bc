"""The vector of a text or a picture, read from the hidden state at its [ENC] (`generation.rows.match`).

Shapes: D width of the transformer, C numbers in a vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.options import WIDTH, check_options, option

FIRST_TEMPERATURE = 0.07  # Radford et al. 2021, arXiv:2103.00020, section 2.5
MOST_SCALE = 100.0  # the same: a lower temperature makes training unstable


@dataclass
class MatchOptions:
    """Whether texts and pictures have vectors, and of how many numbers."""

    width: int = option(
        0, "Numbers in the vector of a text or a picture, which mix.match trains; 0: there is none.",
        least=0, most=WIDTH,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def used(self) -> bool:
        """Whether there are such vectors."""
        return self.width > 0


class MatchHead(nn.Module):
    """A linear map to a vector of length 1, and the temperature that the vectors are compared at in training."""

    def __init__(self, options: MatchOptions, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(options.width, width))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def initialise(self) -> None:
        """Give it random weights, and the usual first temperature."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        self.set_temperature(FIRST_TEMPERATURE)

    def set_temperature(self, temperature: float) -> None:
        nn.init.constant_(self.logit_scale, -math.log(temperature))

    @property
    def scale(self) -> Tensor:
        """The factor of similarities in training, a scalar (1 / temperature)."""
        return self.logit_scale.float().exp().clamp(max=MOST_SCALE)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] to float32 vectors [..., C] of length 1."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.normalize(F.linear(hidden.float(), self.weight.float()), dim=-1)
