"""What a tokenizer is trained to make small: errors of pixels and of edges, what looks different, what looks made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from data.options import check_options, option
from vqvae.discriminator import AdversarialConfig, PatchDiscriminator, adaptive_weight, hinge_loss, with_gradient
from vqvae.model import Reconstruction
from vqvae.perceptual import PerceptualConfig, PerceptualDistance
from vqvae.training.task import Opponent

HEAD_START = 200  # steps in which the discriminator learns before it is listened to


@dataclass
class ReconstructionLossConfig:
    """Weights of the terms; a term of weight 0 is not computed. By default, squared error alone."""

    commitment: float = option(
        0.25, "The weight of the commitment loss, beta of van den Oord et al. 2017, eq. 3.", least=0, most=1e6
    )
    pixel_weight: float = option(
        16.0, "The weight of the squared error of pixels in [0, 1], whose variance is about 1/16.", least=0, most=1e6
    )
    absolute_weight: float = option(
        0.0, "The weight of the absolute error of pixels, which a thin line of the wrong place costs less.",
        least=0, most=1e6,
    )  # fmt: skip
    edge_weight: float = option(
        0.0, "The weight of the absolute error of differences between neighbours: an edge must jump, a flat area must "
        "not ripple.", least=0, most=1e6,
    )  # fmt: skip
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)

    def __post_init__(self) -> None:
        check_options(self)


class TokenizerLoss:
    """The loss of one batch, and the discriminator that trains beside, `opponent`, if there is one.

    `last` is the weight of the decoder's last layer, for the adaptive weight. The training sets `step`. Raises
    `ModelError` for a trunk that cannot be read, and `ValueError` for stages that it lacks.
    """

    step = 0

    def __init__(self, config: ReconstructionLossConfig, last: Tensor, device: torch.device) -> None:
        self.config, self.last = config, last
        self.distance: PerceptualDistance | None = None
        if config.perceptual.weight:
            self.distance = PerceptualDistance.from_config(config.perceptual).to(device)
        self.opponent: Opponent | None = None
        if config.adversarial.weight:
            adversarial = config.adversarial
            judge = PatchDiscriminator(adversarial.channels, adversarial.layers)
            judge = judge.to(device).to(memory_format=torch.channels_last)
            self.opponent = Opponent(judge, self._judge_loss, adversarial.learning_rate)
        self._seen: tuple[Tensor, Tensor] | None = None  # the last batch: real pictures, and made ones

    def __call__(self, restored: Reconstruction, originals: Tensor) -> dict[str, Tensor]:
        """The terms, and "loss" to be minimised, of `originals` [B, 3, H, W] in [0, 1] restored."""
        config, images = self.config, restored.images
        loss = config.pixel_weight * restored.pixel_loss
        terms = {"pixel_loss": restored.pixel_loss, "commitment": restored.commitment}
        if config.absolute_weight:
            terms["absolute"] = (images - originals).abs().mean()
            loss = loss + config.absolute_weight * terms["absolute"]
        if config.edge_weight:
            terms["edges"] = edge_error(images, originals)
            loss = loss + config.edge_weight * terms["edges"]
        if self.distance is not None:
            terms["perceptual"] = self.distance(images, originals)
            loss = loss + config.perceptual.weight * terms["perceptual"]
        if self.opponent is not None:
            learns = self.step >= config.adversarial.start - HEAD_START
            self._seen = (originals, images.detach()) if learns else None
            if self.step >= config.adversarial.start:
                terms["adversarial"] = self._looks_made(images)
                loss = self._with_adversarial(loss, terms["adversarial"], images)
        return {"loss": loss + config.commitment * restored.commitment, **terms}

    def _with_adversarial(self, others: Tensor, adversarial: Tensor, images: Tensor) -> Tensor:
        weight, adaptive = self.config.adversarial.weight, self.config.adversarial.adaptive
        if not adaptive:
            return others + weight * adversarial
        gradients = [torch.autograd.grad(loss, images)[0] for loss in (others, adversarial)]
        ratio = weight * adaptive_weight(gradients[0], gradients[1], images, self.last)
        return with_gradient(others + ratio * adversarial, images, gradients[0] + ratio * gradients[1])

    def _looks_made(self, images: Tensor) -> Tensor:
        assert self.opponent is not None
        with _frozen(self.opponent.model):
            return -self.opponent.model(images).float().mean()

    def _judge_loss(self, judge: nn.Module) -> Tensor | None:
        if self._seen is None:
            return None
        (real, made), self._seen = self._seen, None
        scores = judge(torch.cat([real, made]))  # one pass: DDP wants one
        return hinge_loss(scores[: len(real)], scores[len(real) :])


def edge_error(images: Tensor, originals: Tensor) -> Tensor:
    """Mean absolute error (scalar) of the differences between neighbours, across and down.

    Mathieu et al. 2016 (arXiv:1511.05440), eq. 6, with signed differences, so that an edge of the other direction is
    no match.
    """
    errors = images - originals
    return (errors.diff(dim=-1).abs().mean() + errors.diff(dim=-2).abs().mean()) / 2


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Gradients pass through `module`, but not to its parameters."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
