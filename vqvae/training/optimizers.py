"""Which optimizer trains which parameters, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vqvae.training.config import LoopConfig
from vqvae.training.muon import build_muon
from vqvae.training.sharding import Layout

# of AdamW and Muon; the others choose an implementation, which the moments are stored for
STEP_SETTINGS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "momentum", "nesterov", "ns_steps", "adjust_lr_fn",
                 "rate")  # fmt: skip
STACKED = 3  # axes of several matrices in one parameter


def build_optimizers(
    model: nn.Module, config: LoopConfig, rates: Mapping[str, float] | None = None, layout: Layout | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW, or AdamW and Muon: Muon for the matrices of the model's `blocks`, AdamW for the rest.

    Biases and norm weights are not decayed, as usual. Muon is momentum orthogonalised by a Newton-Schulz iteration
    (Jordan et al. 2024); its step is scaled to the size of AdamW's ("match_rms_adamw", Liu et al. 2025,
    arXiv:2502.16982, section 2.2), so that one learning rate serves both. A parameter of three axes is a stack of
    matrices.
    `rates`: names or patterns (shell wildcards) of parameters of AdamW -> a factor of their learning rate, kept as
    "rate" in its groups; the last one that matches counts. `layout`: how the weights lie in the processes.
    Raises `ValueError` for a pattern that matches nothing.
    """
    rates = rates or {}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for pattern in rates:
        if not any(fnmatch(name, pattern) for name in trained):
            raise ValueError(f"rates: no parameter that is trained matches {pattern!r}")
    matrices = [name for name in trained if trained[name].ndim in (2, STACKED) and not name.endswith("bias")]
    muon = [name for name in matrices if config.optimizer == "muon" and "blocks." in name]
    groups = []
    for factor in sorted({*rates.values(), 1.0}):
        named = [(name, p) for name, p in trained.items() if name not in muon and _rate(name, rates) == factor]
        for is_matrix, decay in ((True, config.weight_decay), (False, 0.0)):
            # one kernel steps a group, and takes no mixture of sharded tensors and others
            for sharded in (False, True):
                some = [(n, p) for n, p in named if (_decays(n, p), isinstance(p, DTensor)) == (is_matrix, sharded)]
                groups.append({"params": some, "weight_decay": decay, "rate": factor})
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        fused=config.fused or None,
    )
    if not muon:
        return [adamw]
    matrix_optimizer = build_muon(
        [(name, trained[name]) for name in muon],
        config.muon_dtype,
        layout or Layout(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [adamw, matrix_optimizer]


def _decays(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix or more; the biases of experts are one to an expert."""
    return parameter.ndim > 1 and not name.endswith("bias")


def _rate(name: str, rates: Mapping[str, float]) -> float:
    return next((factor for pattern, factor in reversed([*rates.items()]) if fnmatch(name, pattern)), 1.0)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the moments of `state`; what it says of how to step is replaced by the settings that `optimizer` has.

    `load_state_dict` alone would bring back the weight decay and the betas of the run that wrote the state.
    """
    settings = [{name: group[name] for name in STEP_SETTINGS if name in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def learning_rate_factor(fraction: float, step: int, config: LoopConfig) -> float:
    """The share of `config.learning_rate` at `step`, with `fraction` (0 to 1) of the run done.

    Linear warm-up, then a cosine from 1 to `final_ratio` (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5).
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
    return config.final_ratio + (1 - config.final_ratio) * cosine
