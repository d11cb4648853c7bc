"""The peak signal-to-noise ratio, the one measure of how close two pictures are."""

import torch
from torch import Tensor

LEAST_ERROR = 1e-10  # equal pictures: 100 dB


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """PSNR [N] in dB, at most 100, of `images` [N, C, H, W] in [0, 1] against `originals`, over all channels."""
    errors = (images - originals).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(errors.clamp_min(LEAST_ERROR))
