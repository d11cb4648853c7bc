"""Experts: MLPs side by side in place of the one of a block, of which a gate chooses a few for each token.

The gates, with their published formulas:

* `switch`: one expert, by a softmax over all, with noise in training (Fedus et al. 2021, arXiv:2101.03961, sections
  2.1 and 2.2, in the form of FastMoE's SwitchGate: He et al. 2021, arXiv:2103.13262);
* `gshard`: two or more, weighed by a softmax over the chosen; in training the second may be left out by chance
  (Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1, in the form of FastMoE's GShardGate);
* `bias`: the highest sigmoids after a bias that no gradient moves: after each step it rises for experts that had less
  than their share (Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

Shapes: B rows, T tokens of a row, N tokens, D width, E experts, k experts of a token, h hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, Protocol, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.options import DEPTH, WIDTH, check_options, option
from generation.transformer.grouped import grouped_product

GateKind = Literal["switch", "gshard", "bias"]


@dataclass
class ExpertOptions:
    """Experts in place of the MLP of a block; none by default."""

    count: int = option(0, "Experts of a layer; 0: a plain MLP.", least=0, most=4096)
    gate: GateKind = option("switch", "Who chooses: switch (one expert), gshard (two) or bias (two, without a loss).")
    top_k: int = option(0, "Experts of a token; 0: 1 for switch, 2 for the others.", least=0, most=4096)
    every: int = option(1, "Put experts into every n-th block, the last of each n.", least=1, most=DEPTH)
    width: int = option(0, "Width inside an expert; 0: that of the MLP.", least=0, most=8 * WIDTH)
    shared: int = option(0, "Experts of that width that every token uses beside those chosen.", least=0, most=1024)
    capacity: float | None = option(
        None, "In training an expert takes this many times its even share of tokens; default: as many as come.",
        above=0, most=4096,
    )  # fmt: skip
    noise: float = option(0.1, "Add uniform noise up to this to the logits of switch in training.", least=0, most=100)
    random_second: bool = option(
        True, "In training gshard leaves out the second expert with the probability 1 - twice its weight."
    )
    balance: float = option(0.01, "Weigh the loss that evens the load of switch and gshard by this.", least=0, most=100)
    bias_rate: float = option(0.001, "Change the biases of the gate bias by this after each step.", least=0, most=1)

    def __post_init__(self) -> None:
        check_options(self)
        if self.gate not in get_args(GateKind):
            raise ValueError(f"experts.gate must be one of {', '.join(get_args(GateKind))}, not {self.gate!r}")
        if self.count == 0:
            changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
            if changed:
                raise ValueError(f"experts.{changed[0]} is given, but experts.count is 0: set it, too")
            return
        if self.count == 1:
            raise ValueError("experts.count=1 leaves nothing to choose: use 2 or more, or 0 for a plain MLP")
        if self.chosen > self.count:
            raise ValueError(f"experts.top_k={self.chosen} must be at most experts.count={self.count}")
        if self.gate == "switch" and self.chosen != 1:
            raise ValueError(f"the gate switch chooses one expert, not experts.top_k={self.top_k}: use gshard or bias")
        if self.gate == "gshard" and self.chosen < 2:
            raise ValueError("the gate gshard chooses two experts or more, not experts.top_k=1: use switch or bias")

    @property
    def used(self) -> bool:
        """Whether there are experts."""
        return self.count > 0

    @property
    def chosen(self) -> int:
        """k: experts of a token."""
        return self.top_k or (1 if self.gate == "switch" else 2)

    def at(self, layer: int) -> bool:
        """Whether the block of that number, from 0, has experts."""
        return self.used and (layer + 1) % self.every == 0


@dataclass
class Routing:
    """Which experts the tokens go to, and what the balance loss is made of.

    `chosen` [N, k], -1 where a token was dropped, and float32 `weights` [N, k]. The loss is E times the sum over
    experts of `firsts` [E] / `tokens` and `probabilities` [E] / `tokens`; the last alone has a gradient.
    """

    chosen: Tensor
    weights: Tensor
    firsts: Tensor
    probabilities: Tensor
    tokens: Tensor

    @property
    def load(self) -> Tensor:
        """Tokens of each expert, float32 [E]."""
        return _counts(self.chosen, len(self.firsts))

    def __deepcopy__(self, memo: object) -> None:
        """A copy of a model has seen nothing yet, and what has a gradient cannot be copied."""


def switch_gate(logits: Tensor, capacity: float | None = None, noise: float = 0.0) -> Routing:
    """The best expert, for `logits` [N, E]; an expert takes ceil(`capacity` N / E) tokens, the first that come.

    The loss counts the tokens that were kept, and divides by their number, as FastMoE does.
    """
    if noise:
        logits = logits + (torch.rand_like(logits) * 2 - 1) * noise  # a softmax ignores the 1 that FastMoE adds, too
    probabilities = logits.float().softmax(dim=-1)
    weights, chosen = probabilities.max(dim=-1, keepdim=True)
    count = logits.shape[1]
    if capacity is not None:
        chosen = keep_first(chosen, count, math.ceil(capacity * len(logits) / count))
    firsts = _counts(chosen, count)
    return Routing(chosen, weights, firsts, probabilities.sum(dim=0), firsts.sum())


def gshard_gate(logits: Tensor, k: int = 2, capacity: float | None = None, random_second: bool = False) -> Routing:
    """The best `k` experts, for `logits` [N, E]; an expert takes ceil(`capacity` N) k / E tokens, the first that come.

    With `random_second` the second is left out where twice its weight is below a random number. The loss counts first
    choices, dropped or not.
    """
    best, chosen = logits.float().topk(k, dim=-1)
    weights, count = best.softmax(dim=-1), logits.shape[1]
    firsts = _counts(chosen[:, :1], count)
    if capacity is not None:
        chosen = keep_first(chosen, count, math.ceil(capacity * len(logits)) * k // count)
    if random_second:
        left_out = 2 * weights[:, 1] < torch.rand_like(weights[:, 1])
        chosen = torch.cat([chosen[:, :1], chosen[:, 1:2].masked_fill(left_out[:, None], -1), chosen[:, 2:]], dim=1)
    sums = logits.float().softmax(dim=-1).sum(dim=0)
    return Routing(chosen, weights, firsts, sums, torch.full_like(firsts[0], len(logits)))


def bias_gate(logits: Tensor, k: int, bias: Tensor, capacity: float | None = None) -> Routing:
    """The `k` experts with the highest sigmoid of `logits` [N, E] plus `bias` [E], weighed by shares of sigmoids."""
    scores, count = logits.float().sigmoid(), logits.shape[1]
    chosen = (scores.detach() + bias.float()).topk(k, dim=-1).indices
    weights = scores.gather(1, chosen)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    firsts = _counts(chosen[:, :1], count)
    if capacity is not None:
        chosen = keep_first(chosen, count, math.ceil(capacity * len(logits)) * k // count)
    sums = (scores / scores.sum(dim=-1, keepdim=True)).sum(dim=0)
    return Routing(chosen, weights, firsts, sums, torch.full_like(firsts[0], len(logits)))


def keep_first(chosen: Tensor, count: int, capacity: int) -> Tensor:
    """`chosen` [N, k] with -1 where an expert has `capacity` tokens already; tokens come in their order."""
    one_hot = F.one_hot(chosen.flatten(), count)  # [N k, E]
    place = (one_hot.cumsum(dim=0) * one_hot).sum(dim=1).view_as(chosen)  # from 1, among those of its expert
    return chosen.masked_fill(place > capacity, -1)


class ExpertWeights(NamedTuple):
    """The weights of one expert."""

    expand: Tensor
    project: Tensor
    expand_bias: Tensor | None = None
    project_bias: Tensor | None = None


class ExpertSource(Protocol):
    """Where the weights of a layer's experts come from, for a model that draws."""

    @property
    def bytes(self) -> int:
        """Bytes of experts in memory at most, of all layers."""

    def begin(self, experts: list[int]) -> None:
        """These will be asked for, in this order."""

    def get(self, expert: int) -> ExpertWeights:
        """The weights of one, valid until the next call."""


STACKS = ExpertWeights._fields  # the parameters of `Experts` that hold them for all experts


class Experts(nn.Module):
    """The layer: [B, T, D] to [B, T, D].

    In training all tokens are sorted by expert and multiplied group by group. In eval mode on a CPU each row is
    computed by itself and nothing is dropped, so that a picture does not depend on those beside it.
    """

    def __init__(
        self, options: ExpertOptions, width: int, hidden: int, *, gated: bool, bias: bool, shared: nn.Module | None
    ) -> None:
        super().__init__()
        count = options.count
        self.options, self.gated = options, gated
        self.router = nn.Linear(width, count, bias=False)
        self.expand = nn.Parameter(torch.empty(count, 2 * hidden if gated else hidden, width))
        self.project = nn.Parameter(torch.empty(count, width, hidden))
        self.expand_bias = nn.Parameter(torch.zeros(count, self.expand.shape[1])) if bias else None
        self.project_bias = nn.Parameter(torch.zeros(count, width)) if bias else None
        self.shared = shared
        self.memory: ExpertSource | None = None  # where the experts are, if they are not here
        if options.gate == "bias":
            self.register_buffer("bias", torch.zeros(count))
            self.register_buffer("load", torch.zeros(count), persistent=False)  # since the last step
        self.routed: Routing | None = None  # of the last pass in training
        # what computes the rows [n, D], sorted by expert, of which each has a number [E]: other processes may do it
        self.compute: Callable[[Tensor, Tensor], Tensor] = self.own

    bias: Tensor
    load: Tensor

    def initialise(self, deviation: float) -> None:
        """Normal, with 0.02, and `deviation` where the branch ends."""
        nn.init.normal_(self.expand, std=0.02)
        nn.init.normal_(self.project, std=deviation)

    @torch.no_grad()
    def copy_dense(self, expand: nn.Linear, project: nn.Linear) -> None:
        """Make every expert the MLP of these two layers (upcycling: Komatsuzaki et al. 2022, arXiv:2212.05055).

        The weights of `switch` are about 1 / E at the start, where those of the others add up to 1, so its experts
        are E times as large.
        """
        scale = self.options.count if self.options.gate == "switch" else 1
        self.expand.copy_(expand.weight.expand_as(self.expand))
        self.project.copy_(project.weight.expand_as(self.project) * scale)
        if self.expand_bias is not None and self.project_bias is not None:
            self.expand_bias.copy_(expand.bias.expand_as(self.expand_bias))
            self.project_bias.copy_(project.bias.expand_as(self.project_bias) * scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            assert self.memory is None, "experts that stay in a file only draw"
            tokens = x.flatten(0, -2)
            routing = self.routed = self._route(tokens)
            y = self._grouped(tokens, routing).view_as(x)
        elif x.device.type == "cpu":
            y = self._row_by_row(x)
        else:
            y = self._grouped(x.flatten(0, -2), self._route(x.flatten(0, -2))).view_as(x)
        return y if self.shared is None else y + self.shared(x)

    def _route(self, x: Tensor) -> Routing:
        """The routing of tokens [N, D], always in float32: choices that rounding turns change the whole token."""
        with torch.autocast(x.device.type, enabled=False):
            return self._gate(F.linear(x.float(), self.router.weight.float()))

    def _gate(self, logits: Tensor) -> Routing:
        options, training = self.options, self.training
        capacity = options.capacity if training else None
        if options.gate == "switch":
            return switch_gate(logits, capacity, options.noise if training else 0.0)
        if options.gate == "gshard":
            return gshard_gate(logits, options.chosen, capacity, options.random_second and training)
        return bias_gate(logits, options.chosen, self.bias, capacity)

    def _grouped(self, x: Tensor, routing: Routing) -> Tensor:
        """The mixed outputs [N, D] of tokens `x` [N, D], all rows of an expert at once."""
        count, k = self.options.count, routing.chosen.shape[1]
        chosen = routing.chosen.flatten()
        order = torch.where(chosen < 0, count, chosen).argsort(stable=True)
        if self.options.capacity is not None or (self.training and self.options.random_second and k > 1):
            order = order[: int((chosen >= 0).sum())]  # those dropped come last
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = self.compute(x.index_select(0, order // k), routing.load.long())
        y = torch.zeros(len(chosen), y.shape[1], dtype=y.dtype, device=y.device).index_copy(0, order, y)
        return (y.view(-1, k, y.shape[1]) * routing.weights.to(y.dtype).unsqueeze(-1)).sum(dim=1)

    def own(self, x: Tensor, counts: Tensor) -> Tensor:
        """The outputs [n, D] of rows `x` [n, D], sorted by expert, `counts` [E] of each expert that is here."""
        hidden = grouped_product(x, self.expand, counts)
        if self.expand_bias is not None:
            hidden = hidden + _repeated(self.expand_bias, counts, len(x)).to(hidden.dtype)
        y = grouped_product(self._activation(hidden), self.project, counts)
        return y if self.project_bias is None else y + _repeated(self.project_bias, counts, len(x)).to(y.dtype)

    def _row_by_row(self, x: Tensor) -> Tensor:
        """The mixed outputs [B, T, D] of rows `x` [B, T, D], each computed by itself; an expert is asked for once."""
        k, (rows, length, _) = self.options.chosen, x.shape
        with torch.autocast(x.device.type, enabled=False):
            logits = torch.cat([F.linear(row.float(), self.router.weight.float()) for row in x])
        routing = self._gate(logits)
        places: dict[int, dict[int, list[int]]] = {}  # of each expert, in each row, the tokens and choices
        for place, expert in enumerate(routing.chosen.flatten().tolist()):
            places.setdefault(expert, {}).setdefault(place // (length * k), []).append(place % (length * k))
        needed = sorted(places)
        if self.memory is not None:
            self.memory.begin(needed)
        outputs: list[Tensor] = []
        order: list[int] = []
        for expert in needed:
            weights = self._weights(expert)
            for row, some in places[expert].items():
                outputs.append(self._one(x[row] if length == 1 else x[row, [place // k for place in some]], weights))
                order += [row * length * k + place for place in some]
        joined = torch.cat(outputs)
        y = torch.zeros_like(joined).index_copy(0, torch.tensor(order), joined).view(rows, length, k, -1)
        shares = routing.weights.to(y.dtype).view(rows, length, k, 1)
        mixed = y[:, :, 0] * shares[:, :, 0]
        for choice in range(1, k):
            mixed = mixed + y[:, :, choice] * shares[:, :, choice]
        return mixed

    def _weights(self, expert: int) -> ExpertWeights:
        if self.memory is not None:
            return self.memory.get(expert)
        biases = [None if bias is None else bias[expert] for bias in (self.expand_bias, self.project_bias)]
        return ExpertWeights(self.expand[expert], self.project[expert], *biases)

    def _one(self, x: Tensor, weights: ExpertWeights) -> Tensor:
        hidden = self._activation(F.linear(x, weights.expand, weights.expand_bias))
        return F.linear(hidden, weights.project, weights.project_bias)

    def _activation(self, hidden: Tensor) -> Tensor:
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            return F.silu(gate) * hidden
        return F.gelu(hidden, approximate="tanh")

    @torch.no_grad()
    def adjust(self) -> None:
        """After a step: raise the biases of experts that had fewer tokens than the mean, and lower those with more."""
        if self.options.gate == "bias":
            self.bias += self.options.bias_rate * (self.load.mean() - self.load).sign()
            self.load.zero_()


def balance(layers: list[Experts]) -> dict[str, Tensor]:
    """What the last pass in training says of the load of the layers, over all processes.

    "balance_loss" is the sum of the layers' losses, weighed, whose mean over processes has the gradient of one process
    that sees all tokens. For the log, "balance" is their mean (1 = even), "load" the busiest expert's over its even
    share, "dropped" the share of choices that were dropped.
    """
    options, count = layers[0].options, layers[0].options.count
    routings = [layer.routed for layer in layers if layer.routed is not None]
    assert len(routings) == len(layers), "a pass in training comes first"
    found = torch.stack([torch.cat([one.firsts, one.load, one.tokens[None]]) for one in routings]).detach()
    choices = torch.full_like(found[0, 0], routings[0].chosen.numel())
    if _processes() > 1:
        dist.all_reduce(found)
        dist.all_reduce(choices)
    firsts, load, tokens = found[:, :count], found[:, count : 2 * count], found[:, -1:].clamp_min(1)
    sums = torch.stack([one.probabilities for one in routings]) * _processes()
    losses = count * (firsts / tokens * sums / tokens).sum(dim=1)
    if options.gate == "bias":
        for layer, tokens_of in zip(layers, load, strict=True):
            layer.load += tokens_of
    for layer in layers:
        layer.routed = None
    weight = options.balance if options.gate != "bias" and layers[0].router.weight.requires_grad else 0.0
    return {
        "balance_loss": weight * losses.sum(),
        "balance": losses.detach().mean(),
        "load": (load.amax(dim=1) / load.mean(dim=1).clamp_min(1e-9)).max(),
        "dropped": 1 - load.sum() / (choices * len(layers)),
    }


def _processes() -> int:
    """How many processes train together. That of `vqvae.training` would be imported by all that draws."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _counts(chosen: Tensor, count: int) -> Tensor:
    """How often each of the experts is in `chosen`, float32 [E]; -1 is none."""
    places = torch.where(chosen < 0, count, chosen).flatten()
    counts = torch.zeros(count + 1, device=chosen.device)
    return counts.scatter_add(0, places, torch.ones_like(places, dtype=counts.dtype))[:count]


def _repeated(bias: Tensor, counts: Tensor, length: int) -> Tensor:
    return torch.repeat_interleave(bias, counts, dim=0, output_size=length)

