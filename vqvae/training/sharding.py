"""How the weights of a model lie in the processes of a mesh, and how they are brought together.

Along `tensor` a matrix, and along `expert` a stack of matrices, may be cut (`Cut`) by the plan of a task; along `data`
and `shard` PyTorch's FSDP2 keeps what is left. Whatever the mesh, `Layout.pieces` says where the numbers of this
process stand in the whole tensor, which is all that a checkpoint needs to be read by any other mesh.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

Piece = tuple[int, int, int]  # along one axis: the first place here, the first place in the whole, and how many


@dataclass(frozen=True)
class Cut:
    """A tensor is `parts` equal tensors behind one another along `axis`; a process has an equal share of each.

    `along` names the axis of the mesh whose processes have the shares.
    """

    axis: int
    parts: int = 1
    along: str = "tensor"

    def of(self, whole: Tensor, mesh: DeviceMesh) -> Tensor:
        """This process's share of `whole`."""
        shares = [part.chunk(mesh.size(), self.axis)[mesh.get_local_rank()] for part in self._parts(whole)]
        return torch.cat(shares, self.axis).detach().clone()

    def join(self, shares: list[Tensor]) -> Tensor:
        """The whole tensor of the shares of all processes."""
        columns = zip(*(self._parts(share) for share in shares), strict=True)
        return torch.cat([share for column in columns for share in column], self.axis)

    def pieces(self, first: int, count: int, size: int, mesh: DeviceMesh) -> list[Piece]:
        """Where the places `first` to `first + count` of this process's share of `size` places stand in the whole."""
        part = size // self.parts
        found: list[Piece] = []
        while count > 0:
            number, inside = divmod(first, part)
            taken = min(count, part - inside)
            place = (number * mesh.size() + mesh.get_local_rank()) * part + inside
            found.append((sum(piece[2] for piece in found), place, taken))
            first, count = first + taken, count - taken
        return found

    def _parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.chunk(self.parts, self.axis)


# cuts what a model has of matrices, in place, and names how; raises `ConfigError` where that is not possible
CutPlan = Callable[[nn.Module, DeviceMesh], dict[str, Cut]]


@dataclass
class Layout:
    """Which tensors are cut and which are not FSDP's, in a mesh; without a mesh, everything is whole."""

    mesh: DeviceMesh | None = None
    plans: dict[str, CutPlan] = field(default_factory=dict)  # by the axis of the mesh
    cuts: dict[str, Cut] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        """Whether this process has less than the whole model; else DDP keeps the processes alike."""
        return self.mesh is not None and any(self.mesh[axis].size() > 1 for axis in ("shard", "expert", "tensor"))

    def apply(self, model: nn.Module, device: torch.device) -> None:
        """Leave in `model`, in place, what this process has of it, on `device`."""
        if self.mesh is None or not self.sharded:
            model.to(device)
            return
        for axis, plan in self.plans.items():
            if self.mesh[axis].size() > 1:
                self.cuts |= plan(model, self.mesh[axis])
        replicas = self.mesh["data", "shard"]
        if replicas.size() > 1 and self.mesh["expert"].size() == 1:
            ignored = set(_left_alone(model))
            for parameter in model.parameters():
                parameter.data = parameter.data.contiguous()  # FSDP takes no channels_last
            for name, module in model.named_modules():
                if name.rpartition(".")[2].endswith("blocks") and isinstance(module, nn.ModuleList | nn.Sequential):
                    for block in module:
                        fully_shard(block, mesh=replicas, ignored_params=ignored)
            fully_shard(model, mesh=replicas, ignored_params=ignored)
        model.to(device)

    def pieces(self, name: str, tensor: Tensor) -> Tensor:
        """What this process has of the tensor `name`, as `torch.distributed.checkpoint` reads and fills it in place.

        `tensor` is a parameter, or what an optimizer or an average keeps of one.
        """
        cut = self.cuts.get(name) if tensor.ndim else None
        if cut is None and not isinstance(tensor, DTensor):
            return tensor.detach()
        sizes, first, local = list(tensor.shape), [0] * tensor.ndim, tensor.detach()
        if isinstance(local, DTensor):
            (chunk,) = local.__create_chunk_list__()
            first = list(chunk.offsets)
            local = local.to_local()
        axes = [[(0, first[axis], count)] for axis, count in enumerate(local.shape)]
        if cut is not None:
            assert self.mesh is not None
            mesh = self.mesh[cut.along]
            axes[cut.axis] = cut.pieces(first[cut.axis], local.shape[cut.axis], sizes[cut.axis], mesh)
            sizes[cut.axis] *= mesh.size()
        described = local.view_as(local)
        places = list(product(*axes)) if local.numel() else []
        for attribute, values in (
            ("global_shape", tuple(sizes)),
            ("local_offsets", tuple(tuple(piece[0] for piece in place) for place in places)),
            ("global_offsets", tuple(tuple(piece[1] for piece in place) for place in places)),
            ("local_sizes", tuple(tuple(piece[2] for piece in place) for place in places)),
        ):
            setattr(described, attribute, values)
        return described

    def gather(self, name: str, tensor: Tensor) -> Tensor:
        """The whole of the tensor `name`, on every process; every process must ask for it."""
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        cut = self.cuts.get(name)
        if cut is None or self.mesh is None:
            return whole
        mesh = self.mesh[cut.along]
        shares = [torch.empty_like(whole, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
        dist.all_gather(shares, whole.contiguous(), group=mesh.get_group())
        return cut.join(shares)

    def fill(self, name: str, tensor: Tensor, whole: Tensor) -> None:
        """Copy from `whole` what this process has of it into `tensor`."""
        fill_pieces(self.pieces(name, tensor), whole)

    def average_gradients(self, named: dict[str, nn.Parameter]) -> None:
        """Average over shares of the batch the gradients that FSDP leaves alone; every process must call this.

        Those of experts were added up over the processes along `expert` when tokens came back.
        """
        if self.mesh is None or not self.sharded:
            return
        sizes = {axis: self.mesh[axis].size() for axis in ("data", "shard", "expert")}
        shares = math.prod(sizes.values())
        if shares == 1:
            return
        for name, parameter in named.items():
            if parameter.grad is not None and not isinstance(parameter, DTensor):
                cut = self.cuts.get(name)
                for axis, size in sizes.items():
                    if size > 1 and (cut is None or cut.along != axis):
                        dist.all_reduce(parameter.grad, group=self.mesh[axis].get_group())
                parameter.grad /= shares

    def clip(self, named: dict[str, nn.Parameter], largest: float) -> Tensor:
        """Scale the gradients of parameters by name so that their norm is `largest` at most; returns what it was."""
        parameters = [parameter for parameter in named.values() if parameter.grad is not None]
        if not self.sharded:
            return nn.utils.clip_grad_norm_(parameters, largest)
        kinds: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in named.items():
            if parameter.grad is not None:
                along = self.cuts[name].along if name in self.cuts else ""
                kinds.setdefault((along, isinstance(parameter, DTensor)), []).append(parameter)
        # every process adds up over the same axes in the same order, whatever gradients it has
        squares = {
            along: torch.zeros((), device=parameters[0].device)
            for along in ("", *sorted({cut.along for cut in self.cuts.values()}))
        }
        for (along, _), group in kinds.items():
            norm = nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in group])
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            squares[along] = squares[along] + norm.square()
        for along, square in squares.items():
            if along and self.mesh is not None:
                dist.all_reduce(square, group=self.mesh[along].get_group())
        total = torch.stack([*squares.values()]).sum().sqrt()
        for group in kinds.values():
            nn.utils.clip_grads_with_norm_(group, largest, total)
        return total


def fill_pieces(target: Any, whole: Tensor) -> None:
    """Copy from `whole` what `target`, as `Layout.pieces` made it, has of it."""
    if not hasattr(target, "global_offsets"):
        target.copy_(whole)
        return
    for here, there, sizes in zip(target.local_offsets, target.global_offsets, target.local_sizes, strict=True):
        part, source = target, whole
        for axis, (first, place, size) in enumerate(zip(here, there, sizes, strict=True)):
            part, source = part.narrow(axis, first, size), source.narrow(axis, place, size)
        part.copy_(source)


@dataclass
class WholeModel:
    """A model without its weights, to be filled when the whole is needed: to evaluate, to draw a sample, to save."""

    layout: Layout
    empty: nn.Module

    @classmethod
    def of(cls, model: nn.Module, layout: Layout) -> WholeModel:
        """Remember what `model`, which is not sharded yet, is besides its weights."""
        return cls(layout, _without_weights(model) if layout.sharded else model)

    def filled(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The whole of the sharded `model`; the same object where nothing is sharded. Every process must ask."""
        if not self.layout.sharded:
            return model
        weights = {name: self.layout.gather(name, tensor) for name, tensor in model.state_dict().items()}
        whole = copy.deepcopy(self.empty)
        whole.load_state_dict(weights, assign=True)
        return whole.to(device)


def _without_weights(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


def _left_alone(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that FSDP cannot shard: numbers, and those of an LSTM, which keeps a list of its own of them."""
    found = [parameter for parameter in model.parameters() if parameter.ndim == 0]
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            found += list(module.parameters(recurse=False))
    return found
