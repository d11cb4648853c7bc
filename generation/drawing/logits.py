"""From logits to a code: guidance, filters, and sampling with noise that belongs to the seed and the place.

Shapes: R rows of a block, N image codes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from generation.drawing.sampling import SamplingOptions


def filter_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Logits [R, N] over the temperature, minus infinity where top-k, top-p or min-p leave a code out.

    Codes tied with the last one kept are kept too, so the result does not depend on the order of a sort.
    """
    logits = logits / options.temperature
    if 0 < options.top_k < logits.shape[-1]:
        smallest = logits.topk(options.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if 0 < options.top_p < 1:
        ordered = logits.sort(dim=-1, descending=True).values
        mass = ordered.softmax(-1)
        kept = mass.cumsum(-1) - mass < options.top_p  # the mass before a code; the first is always kept
        smallest = ordered.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if options.min_p > 0:
        # Nguyen et al. 2024 (arXiv:2407.01082), section 3: p >= min_p * max p, on logits
        least = logits.amax(-1, keepdim=True) + math.log(options.min_p)
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def sample(logits: Tensor, noise: Tensor, options: SamplingOptions) -> Tensor:
    """Codes [...] from logits [..., N] and Gumbel noise [..., N] (`draw_noise`): the Gumbel-max trick.

    argmax(logits + noise) has exactly the softmax's distribution (Maddison et al. 2014, arXiv:1411.0030, section 2).
    With the same noise, slightly different logits mostly give the same code, on which `generation.drawing.jacobi`
    relies.
    """
    return choice_scores(logits, noise, options).argmax(-1)


def choice_scores(logits: Tensor, noise: Tensor, options: SamplingOptions) -> Tensor:
    """[..., N], what the codes that `sample` draws are the argmax of."""
    return logits if options.temperature == 0 else filter_logits(logits, options) + noise


def draw_noise(seed: int, places: int, num_codes: int) -> Tensor:
    """The random numbers of the image with this seed: standard Gumbel, float32 [places, num_codes], on the CPU."""
    uniforms = torch.rand(places, num_codes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    # a uniform of exactly 0 (one in 2**53) gives minus infinity: that code is not drawn
    return uniforms.log_().neg_().log_().neg_().float()


def guide(logits: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: logits [2 R, N], prompted rows then unprompted ones, to [R, N].

    Ho and Salimans 2022 (arXiv:2207.12598), equation 6, with guidance = 1 + w, on logits.
    """
    prompted, unprompted = logits.chunk(2)
    return unprompted + guidance * (prompted - unprompted)
