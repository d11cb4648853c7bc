"""Expert parallelism: processes that share out the experts of a generator and send one another tokens.

As in GShard (Lepikhin et al. 2020, arXiv:2006.16668, section 3.1) and FastMoE (He et al. 2021, arXiv:2103.13262,
section 4.2): each process has a share of the batch and of the experts; a token travels to the process of its expert and
back, by two all-to-all exchanges a layer forward and two backward. All that is no expert is whole on each.

Shapes: E experts, P processes, n rows here, m rows that arrive, D width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh

from data.config import ConfigError
from generation.transformer.experts import STACKS, Experts
from generation.transformer.model import Transformer
from vqvae.training.sharding import Cut


def split_experts(model: Transformer, mesh: DeviceMesh, prefix: str = "") -> dict[str, Cut]:
    """Leave in `model` the experts of this process; returns how each parameter was cut, `prefix` before the names.

    Raises `ConfigError` where the processes cannot share out evenly.
    """
    count, processes = model.config.experts.count, mesh.size()
    if not count:
        raise ConfigError(f"parallel.expert={processes} shares out experts: set model.experts.count, or use shard")
    if count % processes:
        raise ConfigError(f"parallel.expert={processes} does not divide model.experts.count={count}: change one")
    cut, cuts = Cut(0, along="expert"), {}
    for name, layer in model.named_modules():
        if isinstance(layer, Experts):
            for part in STACKS:
                whole = getattr(layer, part)
                if whole is not None:
                    setattr(layer, part, nn.Parameter(cut.of(whole, mesh)))
                    cuts[f"{prefix}{name}.{part}"] = cut
            layer.compute = Exchange(layer, mesh)
    return cuts


class Exchange:
    """`Experts.compute` of processes each of which has an equal share of the experts, one after another."""

    def __init__(self, layer: Experts, mesh: DeviceMesh) -> None:
        self._own, self._mesh = layer.own, mesh

    def __call__(self, x: Tensor, counts: Tensor) -> Tensor:
        """The outputs [n, D] of rows `x` [n, D], sorted by expert, `counts` [E] of each."""
        processes, group = self._mesh.size(), self._mesh.get_group()
        leaving = counts.view(processes, -1)
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving.contiguous(), group=group)
        sent, received = leaving.sum(dim=1).tolist(), arriving.sum(dim=1).tolist()
        rows = all_to_all_single_autograd(x, received, sent, group)
        # they come by process, and within one by expert
        owner = torch.arange(leaving.shape[1], device=x.device).repeat(processes)
        order = torch.repeat_interleave(owner, arriving.flatten(), output_size=sum(received)).argsort(stable=True)
        y = self._own(rows.index_select(0, order), arriving.sum(dim=0))
        y = torch.zeros_like(y).index_copy(0, order, y)
        return all_to_all_single_autograd(y, sent, received, group)
