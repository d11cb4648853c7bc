"""What a checkpoint holds of a run, by name, and how a run takes it up again.

Names are `model/...`, `average/...`, `optimizer.N/PARAMETER/FIELD`, `opponent/...` and `random/REPLICA/...`. They do
not depend on the number of processes, and neither do the tensors, of which each process writes what it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vqvae.training.config import TrainingError
from vqvae.training.opponent import OpponentTraining
from vqvae.training.optimizers import load_optimizer
from vqvae.training.process import replica
from vqvae.training.sharding import Layout
from vqvae.training.stored import Stored

OTHER_PARTS = "train the same parts, or start anew in another out="


@dataclass
class RunState:
    """The parts of a run whose state is kept."""

    layout: Layout
    model: nn.Module
    average: AveragedModel | None
    optimizers: list[torch.optim.Optimizer]
    opponent: OpponentTraining | None
    device: torch.device

    def tensors(self) -> dict[str, Tensor]:
        """What this process has of them, as `Layout.pieces`; it changes as training goes on."""
        found = self._weights("model/", self.model) | self._weights("average/", self.average)
        for number, optimizer in enumerate(self.optimizers):
            found |= _moments(f"optimizer.{number}/", optimizer, self.layout)
        if self.opponent is not None:
            found |= {f"opponent/model/{name}": t for name, t in self.opponent.model.state_dict().items()}
            found |= _moments("opponent/optimizer/", self.opponent.optimizer, Layout())
        return found | _random_states(self.device)

    def facts(self) -> dict[str, Any]:
        """What there is to know before tensors are read."""
        return {"average": self.average is not None, "optimizers": [sorted(order) for order in self.orders()]}

    def orders(self) -> list[list[str]]:
        """The names of the parameters of each optimizer, in the order of those that are not sharded."""
        return [_order(optimizer, self.model) for optimizer in self.optimizers]

    def opponent_order(self) -> list[str]:
        """The same of the opponent's optimizer, if there is one."""
        return _order(self.opponent.optimizer, self.opponent.model) if self.opponent is not None else []

    def restore(self, stored: Stored) -> None:
        """Take up what was kept. Raises `TrainingError` where it is of other settings, before anything is changed."""
        targets = self._weights("model/", self.model) | self._weights("average/", self.average)
        kept = {name for name in stored.shapes if name.startswith(("model/", "average/" if self.average else "model/"))}
        if self.average is not None and not stored.facts.get("average"):
            raise TrainingError(f"{stored} holds no average of the weights; resume with ema=0")
        if kept != set(targets) or any(_shape(target) != stored.shapes[name] for name, target in targets.items()):
            raise TrainingError(f"{stored} holds a model of another configuration")
        names = stored.facts.get("optimizers")
        if not isinstance(names, list) or len(names) != len(self.optimizers):
            raise TrainingError(f"{stored} was written with another loop.optimizer; resume with that one")
        if names != [sorted(order) for order in self.orders()]:
            raise TrainingError(f"{stored} holds optimizers of other parameters: {OTHER_PARTS}")
        if self.opponent is not None:
            self._restore_opponent(self.opponent, stored)
        stored.read(targets)
        for number, optimizer in enumerate(self.optimizers):
            try:
                _load_moments(f"optimizer.{number}/", optimizer, self.layout, stored)
            except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
                raise TrainingError(f"{stored} holds optimizers of other parameters: {OTHER_PARTS}") from error
        try:
            _restore_random_states(stored, self.device)
        except (KeyError, TypeError, RuntimeError) as error:
            raise TrainingError(f"{stored} holds no state of the random numbers that PyTorch can take") from error

    def _weights(self, prefix: str, model: nn.Module | None) -> dict[str, Tensor]:
        if model is None:
            return {}
        return {
            prefix + name: self.layout.pieces(name.removeprefix("module.") if prefix == "average/" else name, tensor)
            for name, tensor in model.state_dict().items()
        }

    def _restore_opponent(self, opponent: OpponentTraining, stored: Stored) -> None:
        targets = {f"opponent/model/{name}": t.detach() for name, t in opponent.model.state_dict().items()}
        if not any(name.startswith("opponent/model/") for name in stored.shapes):
            raise TrainingError(f"{stored} holds no opponent: it was written without adversarial.weight")
        if any(stored.shapes.get(name) != tuple(target.shape) for name, target in targets.items()):
            raise TrainingError(f"{stored} holds an opponent of another configuration")
        stored.read(targets)
        try:
            _load_moments("opponent/optimizer/", opponent.optimizer, Layout(), stored)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise TrainingError(f"{stored} holds an opponent of another configuration") from error


def _shape(pieces: Tensor) -> tuple[int, ...]:
    return tuple(getattr(pieces, "global_shape", pieces.shape))


def _named(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The parameters with their names, in the order of their places in the optimizer's state."""
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def _order(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    place = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    entries = [
        (group.get("rate", 1.0), parameter.ndim <= 1, place[name], name)
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    ]
    return [name for *_, name in sorted(entries)]


def _moments(prefix: str, optimizer: torch.optim.Optimizer, layout: Layout) -> dict[str, Tensor]:
    return {
        f"{prefix}{name}/{field}": layout.pieces(name, value)
        for name, parameter in _named(optimizer)
        for field, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _load_moments(prefix: str, optimizer: torch.optim.Optimizer, layout: Layout, stored: Stored) -> None:
    """A moment has the shape of its parameter; what else a state holds (a count of steps) is the same everywhere."""
    fields: dict[str, list[str]] = {}
    for full in stored.shapes:
        if full.startswith(prefix):
            name, _, field = full.removeprefix(prefix).rpartition("/")
            fields.setdefault(name, []).append(field)
    state: dict[int, dict[str, Tensor]] = {}
    targets: dict[str, Tensor] = {}
    for place, (name, parameter) in enumerate(_named(optimizer)):
        shape = _shape(layout.pieces(name, parameter))
        for field in fields.get(name, []):
            full = f"{prefix}{name}/{field}"
            like_it = shape and stored.shapes[full] == shape
            value = torch.zeros_like(parameter) if like_it else torch.zeros(stored.shapes[full])
            state.setdefault(place, {})[field] = value
            targets[full] = layout.pieces(name, value) if like_it else value
    stored.read(targets)
    load_optimizer(optimizer, {"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the random numbers, which processes that see the same share of a batch have alike."""
    states = {f"random/{replica()}/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"random/{replica()}/cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_random_states(stored: Stored, device: torch.device) -> None:
    """Each replica goes on with its own numbers; one beyond those of the checkpoint keeps the state it has.

    An old checkpoint holds one CPU state, that of rank 0, which every process takes. Raises `RuntimeError`, `TypeError`
    or `KeyError` for what is no such state.
    """
    prefix = f"random/{0 if stored.facts.get('one random state') else replica()}/"
    targets = {
        name: torch.zeros(shape, dtype=torch.uint8) for name, shape in stored.shapes.items() if name.startswith(prefix)
    }
    if not any(name.startswith("random/0/cpu") for name in stored.shapes):
        raise KeyError("no state of the CPU's random numbers")
    stored.read(targets)
    for name, state in targets.items():
        if name.endswith("/cpu"):
            torch.set_rng_state(state)
        elif device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
