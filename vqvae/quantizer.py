"""Vector quantisation with a codebook learned by exponential moving averages.

van den Oord et al. 2017, "Neural Discrete Representation Learning", section 3 and appendix A.1; the restart of dead
codes as in Dhariwal et al. 2020 (Jukebox, section 3.1); the cosine lookup as in Yu et al. 2022 (ViT-VQGAN, section
3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Quantized:
    """`vectors` [..., D] carry the straight-through gradient; `codes` [...]; `commitment` is a scalar loss."""

    vectors: Tensor
    codes: Tensor
    commitment: Tensor


class EMAQuantizer(nn.Module):
    """Nearest code by squared Euclidean distance, or by cosine (vectors and codes then lie on the unit sphere).

    `restart_below`: a code whose moving average of uses per batch falls below it is moved onto a random encoder output
    of the batch; 0 switches that off, and the initial codebook is then random instead of being drawn from data.
    """

    codebook: Tensor
    cluster_size: Tensor
    cluster_sum: Tensor
    initialised: Tensor

    def __init__(self, codes: int, dim: int, *, cosine: bool = False, decay: float = 0.98, restart_below: float = 0.3):
        super().__init__()
        self.cosine, self.decay, self.restart_below = cosine, decay, restart_below
        codebook = torch.randn(codes, dim)
        if cosine:
            codebook = F.normalize(codebook, dim=-1)
        self.register_buffer("codebook", codebook)  # [N, D]
        self.register_buffer("cluster_size", torch.ones(codes))  # N_i of eq. 6
        self.register_buffer("cluster_sum", codebook.clone())  # m_i of eq. 7
        self.register_buffer("initialised", torch.tensor(restart_below == 0))

    def forward(self, vectors: Tensor) -> Quantized:
        """`vectors` [..., D] of any float type; the lookup runs in float32, since bf16 confuses near codes."""
        flat = vectors.reshape(-1, vectors.shape[-1]).float()  # [M, D]
        if self.cosine:
            flat = F.normalize(flat, dim=-1)
        learning = self.training and _finite(flat)  # else one bad batch spoils the codes, before the loss can tell
        if learning and not self.initialised:
            everything = torch.ones_like(self.cluster_size, dtype=torch.bool)
            self._restart(everything, flat.detach(), torch.ones_like(flat[:, 0]))
            self.initialised.fill_(True)
        codes = self.nearest(flat)
        chosen = self.codebook.float()[codes]
        commitment = F.mse_loss(flat, chosen)  # eq. 3, third term; the codebook follows by EMA instead of a loss
        if learning:
            self._update(flat.detach(), codes, (flat.detach() - chosen).square().sum(dim=-1))
        passed = flat + (chosen - flat).detach()  # straight-through estimator
        return Quantized(passed.view(vectors.shape).to(vectors.dtype), codes.view(vectors.shape[:-1]), commitment)

    def nearest(self, flat: Tensor) -> Tensor:
        """Indices [M] of the nearest codes to `flat` [M, D] (already normalised for cosine)."""
        codebook = self.codebook.float()
        with torch.autocast(flat.device.type, enabled=False):  # training's autocast would multiply in bf16
            products = flat @ codebook.T
        if self.cosine:
            return products.argmax(dim=-1)
        return (codebook.square().sum(dim=-1) - 2 * products).argmin(dim=-1)  # |x|^2 is the same for every code

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors [..., D] of `codes` [...]."""
        return F.embedding(codes, self.codebook)

    @torch.no_grad()
    def _update(self, flat: Tensor, codes: Tensor, errors: Tensor) -> None:
        size = torch.zeros_like(self.cluster_size).index_add_(0, codes, torch.ones_like(flat[:, 0]))
        total = torch.zeros_like(self.cluster_sum).index_add_(0, codes, flat)
        if dist.is_available() and dist.is_initialized():
            # every rank then holds the same codebook
            dist.all_reduce(size)
            dist.all_reduce(total)
        self.cluster_size.lerp_(size, 1 - self.decay)
        self.cluster_sum.lerp_(total, 1 - self.decay)
        # Laplace smoothing (appendix A.1) would pull rare codes to the origin; a floor on the count does not
        means = self.cluster_sum / self.cluster_size.clamp_min(1e-5).unsqueeze(-1)
        used = self.cluster_size > 1e-5
        self.codebook[used] = (F.normalize(means, dim=-1) if self.cosine else means)[used]
        if self.restart_below > 0:
            self._restart(self.cluster_size < self.restart_below, flat, errors)

    @torch.no_grad()
    def _restart(self, dead: Tensor, flat: Tensor, errors: Tensor) -> None:
        count = int(dead.sum())
        if count == 0:
            return
        # badly coded vectors first, as k-means++ seeds its centres (Arthur and Vassilvitskii 2007): most patches of
        # most pictures are plain background, which needs no second code
        picked = flat[torch.multinomial(errors + 1e-10, count, replacement=True)]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(picked, src=0)
        self.codebook[dead] = picked
        # one use a batch: long enough to be chosen before it counts as dead again
        self.cluster_size[dead] = 1.0
        self.cluster_sum[dead] = picked


def _finite(flat: Tensor) -> bool:
    """Whether every number is finite, in every process: they must all update the codebook, or none."""
    finite = flat.detach().isfinite().all()
    if dist.is_available() and dist.is_initialized():
        finite = finite.int()
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)
