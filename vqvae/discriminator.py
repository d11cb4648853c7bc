"""A discriminator of patches, which learns to tell a tokenizer's pictures from real ones: the adversarial term.

Isola et al. 2017 (arXiv:1611.07004), section 3.2.2, the discriminator; Esser et al. 2021 (VQGAN, arXiv:2012.09841),
eq. 5 to 7, its part in the loss; Lim and Ye 2017 (arXiv:1705.02894), the hinge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.options import check_options, option

NORM_GROUPS = 8
LARGEST_WEIGHT = 1e4  # of the adaptive weight, as in VQGAN's code


@dataclass
class AdversarialConfig:
    """The adversarial term of the loss, and the discriminator that it comes from. `channels` is a multiple of 8."""

    weight: float = option(0.0, "Weight of the adversarial term; 0 trains no discriminator.", least=0)
    adaptive: bool = option(False, "Scale the weight to the other terms' gradient at the decoder's last layer.")
    start: int = option(
        1000, "The step from which the term counts; the discriminator learns 200 steps before.", least=0
    )
    channels: int = option(32, "Channels after the first convolution; each further one doubles them.", least=8)
    layers: int = option(3, "Convolutions of stride 2, which set the size of a patch.", least=1, most=6)
    learning_rate: float = option(4e-4, "The discriminator's learning rate after the warm-up.", least=0)

    def __post_init__(self) -> None:
        check_options(self)
        if self.channels % NORM_GROUPS:
            raise ValueError(f"adversarial.channels must be a multiple of {NORM_GROUPS}, not {self.channels}")


class PatchDiscriminator(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] to a score of each patch [B, 1, h, w]: above 0 says real.

    Groups are normalised, not the batch, which is small and holds made or real pictures alone.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        sizes = [channels * 2**layer for layer in range(layers)]
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, after in zip(sizes, sizes[1:], strict=False):
            parts += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(NORM_GROUPS, after)]
            parts += [nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*parts, nn.Conv2d(sizes[-1], 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.layers((2 * images - 1).contiguous(memory_format=torch.channels_last))
        return scores


def hinge_loss(real: Tensor, made: Tensor) -> Tensor:
    """The discriminator's loss (scalar) of its scores of real and of made pictures."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + made.float()).mean())


def adaptive_weight(others: Tensor, adversarial: Tensor, images: Tensor, last: Tensor) -> Tensor:
    """lambda of Esser et al. 2021, eq. 7: the ratio of two losses' gradients at the weights `last` of the decoder.

    The gradients are given at the `images` that the decoder made: from there to its last layer is a short way, and the
    long way through trunk and discriminator is not gone twice.
    """
    wanted, given = (
        torch.autograd.grad(images, last, gradient, retain_graph=True)[0].float().norm()
        for gradient in (others, adversarial)
    )
    return (wanted / (given + 1e-4)).clamp(0, LARGEST_WEIGHT).detach()


def with_gradient(loss: Tensor, images: Tensor, gradient: Tensor) -> Tensor:
    """The value of `loss`, whose gradient at `images` is known: `backward` goes on from there."""
    passed: Tensor = _Known.apply(loss.detach(), images, gradient.detach())
    return passed


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, loss: Tensor, images: Tensor, gradient: Tensor) -> Tensor:
        context.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = context.saved_tensors
        return None, upstream[0] * gradient, None
