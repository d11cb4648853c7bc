"""Muon whose orthogonalisation runs in float32, and the choice between that and PyTorch's, which runs in bfloat16."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim._muon import _adjust_lr  # the only part of PyTorch's step that is worth no second copy

from vqvae.training.process import distributed, print_once, rank
from vqvae.training.sharding import Layout

SIDE = 256  # of the matrices of the trial
TRIALS = 5
MARGIN = 1.5  # bfloat16 is left where it takes so many times as long: noise should not change a run's numbers

Rounding = Literal["bfloat16", "float32"]


class Float32Muon(torch.optim.Muon):
    """`torch.optim.Muon` with the same settings and state, whose Newton-Schulz iteration runs in float32.

    PyTorch's casts to bfloat16 inside, and a CPU that only emulates it spends most of a training step there.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, as PyTorch's: momentum, orthogonalised, at the adjusted learning rate; decoupled weight decay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        update, shape = self._orthogonal(parameter, update, group)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], shape))

    def _orthogonal(self, parameter: Tensor, update: Tensor, group: dict[str, Any]) -> tuple[Tensor, torch.Size]:
        """The orthogonalised update, and the shape of the whole matrix."""
        return orthogonalise(update, group["ns_coefficients"], group["ns_steps"], group["eps"]), update.shape


class ShardedMuon(Float32Muon):
    """Muon for matrices that processes share out: each process orthogonalises the whole, and steps what it has of it.

    Newton-Schulz needs the whole matrix, so its cost is not shared out; the momentum is. A process has one matrix whole
    at a time. Of a parameter [n, rows, columns], as experts have, each of the n matrices is orthogonalised by itself.
    """

    def __init__(self, named: list[tuple[str, Tensor]], layout: Layout, dtype: torch.dtype, **settings: Any) -> None:
        flat = [(name, parameter) for name, parameter in named if parameter.ndim == 2]
        super().__init__(flat or [("", torch.zeros(1, 1))], **settings)
        # PyTorch's refuses any other parameter than a matrix
        self.param_groups[0]["params"] = [parameter for _, parameter in named]
        self.param_groups[0]["param_names"] = [name for name, _ in named]
        self.layout, self.dtype = layout, dtype
        self.names = {id(parameter): name for name, parameter in named}

    def _orthogonal(self, parameter: Tensor, update: Tensor, group: dict[str, Any]) -> tuple[Tensor, torch.Size]:
        name = self.names[id(parameter)]
        whole = self.layout.gather(name, update).to(self.dtype)
        matrices = [
            orthogonalise(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"])
            for matrix in (whole.unbind(0) if whole.ndim > 2 else [whole])
        ]
        own = torch.zeros_like(parameter)
        self.layout.fill(name, own, torch.stack(matrices) if whole.ndim > 2 else matrices[0])
        return own, matrices[0].shape


def orthogonalise(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, least: float) -> Tensor:
    """The quintic Newton-Schulz iteration (Jordan et al. 2024) on `matrix` [m, n] over its norm, in its own dtype.

    `least` is the smallest norm that is divided by. Singular values come out between about 0.7 and 1.2.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=least)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def build_muon(
    named: list[tuple[str, Tensor]], dtype: Rounding | Literal["auto"], layout: Layout, **settings: Any
) -> torch.optim.Muon:
    """Muon for parameters by name that orthogonalises in `dtype`; "auto" is bfloat16 but where `bfloat16_is_slow`."""
    device = named[0][1].device
    if dtype == "auto":
        # every process must round alike, or their weights would drift apart: the first decides
        slow = torch.tensor(float(rank() == 0 and device.type == "cpu" and bfloat16_is_slow()))
        if distributed():
            slow = slow.to(device)
            dist.broadcast(slow, src=0)
        dtype = "float32" if bool(slow) else "bfloat16"
    if layout.sharded or any(parameter.ndim > 2 for _, parameter in named):
        return ShardedMuon(named, layout, torch.float32 if dtype == "float32" else torch.bfloat16, **settings)
    kind = Float32Muon if dtype == "float32" else torch.optim.Muon
    return kind(named, **settings)


@cache
def bfloat16_is_slow() -> bool:
    """Whether a product of two small matrices takes `MARGIN` times as long in bfloat16 on this CPU; printed."""
    seconds = {dtype: _product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    slow = seconds[torch.bfloat16] > MARGIN * seconds[torch.float32]
    full, half = (1000 * seconds[dtype] for dtype in (torch.float32, torch.bfloat16))
    print_once(
        f"muon in {'float32' if slow else 'bfloat16'}: a product of {SIDE} x {SIDE} takes {full:.2f} ms in float32, "
        f"{half:.2f} ms in bfloat16"
    )
    return slow


def _product_seconds(dtype: torch.dtype) -> float:
    """The shortest of several products: the first one sets things up, and others may wait for a busy core."""
    matrix = torch.ones(SIDE, SIDE, dtype=dtype)
    found = []
    for _ in range(TRIALS):
        started = time.perf_counter()
        matrix @ matrix
        found.append(time.perf_counter() - started)
    return min(found)
