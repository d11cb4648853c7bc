"""The tensor-parallel plan of the transformer: how several processes share out each matrix of a block.

As in Megatron (Shoeybi et al. 2019, arXiv:1909.08053, section 3): a process has some of the heads and some of the
hidden numbers of the MLP, so a block costs two sums over processes forward and two backward. Embeddings, norms and the
head stay whole on each.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from data.config import ConfigError
from generation.transformer.model import MLP, Block, RMSNorm, Transformer
from vqvae.training.sharding import Cut


def split_blocks(model: Transformer, mesh: DeviceMesh, prefix: str = "") -> dict[str, Cut]:
    """Leave in each block of `model` what this process has of it; returns how each parameter was cut.

    `prefix` is put before the names. Raises `ConfigError` where the processes cannot share out evenly.
    """
    config, count = model.config, mesh.size()
    if config.key_heads != config.heads:  # a cut is of parts of one size
        raise ConfigError(
            f"parallel.tensor={count} takes no kv_heads={config.kv_heads}: use parallel.shard, or kv_heads=0"
        )
    if config.experts.used:
        raise ConfigError(f"parallel.tensor={count} takes no experts: use parallel.expert or parallel.shard")
    for name, size in (("heads", config.heads), ("hidden_width", config.hidden_width)):
        if size % count:
            raise ConfigError(f"parallel.tensor={count} does not divide the generator's {name}={size}: change one")
    gates = 2 if config.mlp == "swiglu" else 1
    cuts: dict[str, Cut] = {}
    for number, block in enumerate(model.blocks):
        block = cast(Block, block)
        name = f"{prefix}blocks.{number}"
        mlp = cast(MLP, block.mlp)
        for part, layer, cut in (
            ("attention.qkv", block.attention.qkv, Cut(0, 3)),
            ("mlp.expand", mlp.expand, Cut(0, gates)),
            ("attention.project", block.attention.project, Cut(1)),
            ("mlp.project", mlp.project, Cut(1)),
        ):
            if type(layer) is not nn.Linear:
                raise ConfigError("parallel.tensor shares out plain matrices alone: a style trains with parallel.shard")
            made = (ColumnLinear if cut.axis == 0 else RowLinear)(layer, cut, mesh)
            block.set_submodule(part, made)
            cuts[f"{name}.{part}.weight"] = cut
            if layer.bias is not None and cut.axis == 0:
                cuts[f"{name}.{part}.bias"] = cut
        for part, norm in (("q_norm", block.attention.q_norm), ("k_norm", block.attention.k_norm)):
            if isinstance(norm, RMSNorm):
                block.attention.set_submodule(part, HeadNorm(norm, mesh))
    return cuts


def to_all(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """`x`, which all processes have alike and use for their part; backward, its gradients are added up."""
    return DTensor.from_local(x, mesh, [Replicate()]).to_local(grad_placements=[Partial()])


def sum_of_all(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the `x` of all processes."""
    return DTensor.from_local(x, mesh, [Partial()]).redistribute(mesh, [Replicate()]).to_local()


class ColumnLinear(nn.Module):
    """A linear layer of which this process computes some outputs; its input is whole."""

    def __init__(self, layer: nn.Linear, cut: Cut, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = nn.Parameter(cut.of(layer.weight, mesh))
        self.bias = None if layer.bias is None else nn.Parameter(cut.of(layer.bias, mesh))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(to_all(x, self.mesh), self.weight, self.bias)


class RowLinear(nn.Module):
    """A linear layer of which this process has some inputs; its output is whole."""

    def __init__(self, layer: nn.Linear, cut: Cut, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = nn.Parameter(cut.of(layer.weight, mesh))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        x = sum_of_all(F.linear(x, self.weight), self.mesh)
        return x if self.bias is None else x + self.bias.to(x.dtype)


class HeadNorm(nn.Module):
    """The norm of a head's queries or keys: the same weight for the heads of all processes."""

    def __init__(self, norm: RMSNorm, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh, self.weight, self.eps = mesh, norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        weight = to_all(self.weight, self.mesh)
        return F.rms_norm(x, tuple(weight.shape), weight.to(x.dtype), self.eps)
