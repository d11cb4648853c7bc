"""How one decoding step is run: by the model's modules, fused by hand on a CPU, or recorded or compiled on a GPU.

Prefill is always `Transformer.forward` over many tokens, which is fast on all hardware. A step has one token a row: so
little work that most of the time goes into starting operations, and each way here starts fewer and larger ones. All
give the numbers of `Transformer.forward` up to rounding. They round differently, so the same seed may give another
picture with another engine.

Shapes: R rows, T slots of the cache, S codes of a picture, N image codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from generation.drawing.fused_step import FusedStep, can_fuse
from generation.drawing.ragged_cache import RaggedCache
from generation.transformer.cache import KVCache
from generation.transformer.model import Transformer

Kind = Literal["auto", "modules", "fused", "graph", "compile"]
REACH = 256  # slots by which the attention of a recorded step grows


@dataclass(frozen=True)
class Engine:
    """How a step is run, and how many pictures are drawn side by side.

    `kind`: "modules" calls `Transformer.forward`; "fused" is `FusedStep`, for the models and CPUs it knows; "graph"
    replays a CUDA graph of the modules' step; "compile" has torch.compile fuse it first, which takes half a minute or
    more before the first picture of a shape. "auto" is "fused" or "modules".

    `images` 0: blocks as `blocks.block_rows` says, and a picture does not depend on what else is drawn. Otherwise
    blocks have this many pictures: fewer for latency, more for throughput. Each number rounds differently.
    """

    kind: Kind = "auto"
    images: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"unknown engine {self.kind!r}; choose from {', '.join(get_args(Kind))}")
        if self.images < 0:
            raise ValueError(f"images must be 0 (as the model says) or more, not {self.images}")

    def resolved(self, model: Transformer) -> Kind:
        """The engine to use ("auto" chosen). Raises `ValueError` for one that the model or device does not support."""
        if self.kind == "auto":
            return "fused" if can_fuse(model) else "modules"
        if self.kind == "fused" and not can_fuse(model):
            raise ValueError(
                "the fused engine supports only models of the modern structure on a CPU, without experts: "
                "use modules or auto"
            )
        device = model.embed.weight.device.type
        if self.kind in ("graph", "compile") and model.config.experts.used:
            raise ValueError(f"the {self.kind} engine cannot record which experts a token needs: use modules or auto")
        if self.kind == "graph" and device != "cuda":
            raise ValueError("the graph engine needs a CUDA device: use auto")
        if self.kind == "compile" and device not in ("cuda", "cpu"):
            raise ValueError(f"the compile engine supports cuda and cpu, not {device}: use auto")
        return self.kind


class Step(Protocol):
    """Reads one code of every row, number `place` of its picture, into the cache."""

    def __call__(self, codes: Tensor, place: int) -> Tensor:
        """Float32 logits [R, N] of the code after `codes` [R]. A graph overwrites them in the next call."""
        ...


def cache_dtype(model: Transformer) -> torch.dtype:
    """The dtype of keys and values in the cache."""
    # on a CPU attention to one query is faster in float32, and the cache then saves converting it at every step
    return torch.float32 if model.embed.weight.device.type == "cpu" else model.embed.weight.dtype


def make_cache(kind: Kind, model: Transformer, hidden: Tensor) -> KVCache:
    """An empty cache for prefill and for the steps of `make_step`; `hidden` [R, T] as in `KVCache`."""
    dtype, device = cache_dtype(model), model.embed.weight.device
    if kind in ("graph", "compile"):
        key = (kind, *hidden.shape, dtype, device)
        recorded = _recorded(model)
        if recorded is None or recorded.key != key:
            cache = RaggedCache(model.config, hidden, dtype=dtype, device=device, kernels=kind == "graph")
            recorded = Recorded(key, cache)
            model.__dict__["_recorded"] = recorded  # gone with the model
        recorded.cache.begin(hidden)
        return recorded.cache
    return KVCache(model.config, hidden, dtype=dtype, device=device)


def make_step(kind: Kind, model: Transformer, positions: Tensor, cache: KVCache) -> Step:
    """The steps after a prefill; `positions` [R, S] or [R, S, 2] are those of the codes."""
    if kind == "fused":
        return FusedStep(model, positions, cache)
    if kind == "modules":
        return ModuleStep(model, positions, cache)
    recorded = _recorded(model)
    assert recorded is not None
    assert recorded.cache is cache
    if recorded.step is None:
        prepare = compiled
        if positions.device.type == "cuda":
            prepare = record if kind == "graph" else record_compiled
        # each reach would be compiled anew, which takes far longer than looking at empty slots
        stride = REACH if kind == "graph" else cache.length
        recorded.step = StaticStep(model, positions, recorded.cache, prepare, stride)
    recorded.step.begin(positions)
    return recorded.step


@dataclass
class Recorded:
    """Cache and step of the last block, kept for the next call: recording and compiling take longer than a picture."""

    key: tuple[object, ...]
    cache: RaggedCache
    step: StaticStep | None = None

    def __deepcopy__(self, memo: object) -> None:
        """A copy of the model records its own."""


def _recorded(model: Transformer) -> Recorded | None:
    return model.__dict__.get("_recorded")


class ModuleStep:
    """A step by `Transformer.forward`, for every model and device."""

    def __init__(self, model: Transformer, positions: Tensor, cache: KVCache) -> None:
        self._model, self._positions, self._cache = model, positions, cache

    def __call__(self, codes: Tensor, place: int) -> Tensor:
        hidden = self._model(codes.unsqueeze(1), self._positions[:, place : place + 1], self._cache)
        return self._model.logits(hidden[:, 0], image_only=True).float()


class StaticStep:
    """A step whose tensors keep their shapes and addresses, so that it can be recorded once and replayed.

    The place is a number on the device. PyTorch's attention covers the slots up to the next multiple of `stride` that
    the longest row needs, with the slots behind a token masked. Each such reach has a step of its own, recorded when it
    is first needed. `prepare` takes a function without arguments and returns a faster one (`record`, `compiled`).
    """

    def __init__(
        self,
        model: Transformer,
        positions: Tensor,
        cache: RaggedCache,
        prepare: Callable[[Callable[[], Tensor]], Callable[[], Tensor]],
        stride: int,
    ) -> None:
        self._model, self._cache, self._prepare = model, cache, prepare
        self._positions = positions.clone()
        self._first = cache.length - positions.shape[1] + 1  # the last code is never a token
        self._stride = stride
        self._codes = torch.zeros_like(positions[:, :1, 0] if positions.ndim == 3 else positions[:, :1])  # [R, 1]
        self._here = torch.zeros_like(positions[:, :1])
        self._steps: dict[int, Callable[[], Tensor]] = {}

    def begin(self, positions: Tensor) -> None:
        """Take the positions of other pictures of the same shape."""
        self._positions.copy_(positions)

    def __call__(self, codes: Tensor, place: int) -> Tensor:
        slot = self._first + place
        self._codes[:, 0] = codes
        self._here.copy_(self._positions[:, place : place + 1])
        self._cache.move_to(slot)
        reach = slot - self._cache.least_padding + 1
        self._cache.reach = min(self._cache.length, -(-reach // self._stride) * self._stride)
        if self._cache.reach not in self._steps:
            self._steps[self._cache.reach] = self._prepare(self._run)
        return self._steps[self._cache.reach]()

    def _run(self) -> Tensor:
        hidden = self._model(self._codes, self._here, self._cache)
        return self._model.logits(hidden[:, 0], image_only=True).float()


def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A CUDA graph of `run`. Its result is overwritten by the next replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first calls initialise libraries, which cannot be recorded
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def compiled(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`run` through torch.compile, which caches its code on disk (TORCHINDUCTOR_CACHE_DIR)."""
    return torch.compile(run, fullgraph=True, dynamic=False)


def record_compiled(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A CUDA graph of the compiled `run`."""
    return record(compiled(run))
