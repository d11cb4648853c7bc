"""Which optimizer trains which parameters, and the learning rate of a step."""

from __future__ import annotations

import math

import torch
from torch import nn

from vqvae.training.config import LoopConfig


def build_optimizers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """AdamW, or AdamW and Muon: Muon for the matrices of the model's `blocks`, AdamW for the rest.

    Biases and norm weights are not decayed, as usual. Muon is momentum orthogonalised by a Newton-Schulz iteration
    (Jordan et al. 2024); its step is scaled to the size of AdamW's ("match_rms_adamw", Liu et al. 2025,
    arXiv:2502.16982, section 2.2), so that one learning rate serves both.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    muon = [name for name in trained if config.optimizer == "muon" and "blocks." in name and trained[name].ndim == 2]
    matrices = [p for name, p in trained.items() if name not in muon and p.ndim > 1]
    vectors = [p for p in trained.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        fused=config.fused or None,
    )
    if not muon:
        return [adamw]
    matrix_optimizer = torch.optim.Muon(
        [trained[name] for name in muon],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [adamw, matrix_optimizer]


def learning_rate_factor(fraction: float, step: int, config: LoopConfig) -> float:
    """The share of `config.learning_rate` at `step`, with `fraction` (0 to 1) of the run done.

    Linear warm-up, then a cosine from 1 to `final_ratio` (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5).
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
    return config.final_ratio + (1 - config.final_ratio) * cosine
