"""More experts than memory: they stay in the file, and as many as fit into a number of bytes are kept.

A generator that draws uses few experts for a code, and some far more often than others. `ExpertMemory` keeps those that
were used most, and a thread reads those that come next: the rest of the layer's, and of the next layer those that the
code before used (as InfMoE moves them ahead: CPM-2, Zhang et al. 2021, arXiv:2106.10715, section 5).

An expert is read into memory of the alignment that it would have in the whole tensor, and multiplied as there: a
picture has the same bits whatever is kept.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from generation.transformer.config import TransformerConfig
from generation.transformer.experts import STACKS, Experts, ExpertWeights
from generation.transformer.model import Transformer
from vqvae.storage.parts import ModelError, check_names, read_empty_part
from vqvae.storage.weights_file import WeightsFile

Key = tuple[int, int]  # the number of a layer with experts, and of an expert in it
ALIGNMENT = 64  # bytes: a kernel may add up in another order from another place in a cache line
PASSING = 3  # places for experts that are used and not kept: one in use, two that are read ahead
MARGIN = 1  # an expert takes another's place when it was used so many times more: equals would only change places


def expert_bytes(config: TransformerConfig, dtype: torch.dtype) -> int:
    """Bytes of one expert in memory."""
    hidden, gates = config.experts.width or config.hidden_width, 2 if config.mlp == "swiglu" else 1
    numbers = (gates + 1) * hidden * config.width + (gates * hidden + config.width if config.bias else 0)
    return numbers * dtype.itemsize


def all_expert_bytes(config: TransformerConfig, dtype: torch.dtype) -> int:
    """Bytes of all experts of a generator in memory, shared ones left out."""
    layers = sum(config.experts.at(layer) for layer in range(config.depth))
    return layers * config.experts.count * expert_bytes(config, dtype)


@dataclass
class Place:
    """Memory for one expert: bytes for each of its tensors, and the tensors in them."""

    bytes: list[Tensor]
    weights: list[Tensor]
    loaded: Future[None] | None = None


@dataclass
class ExpertCounts:
    """How often an expert was kept, had been read ahead, or was waited for."""

    kept: int = 0
    ahead: int = 0
    waited: int = 0


class ExpertMemory:
    """The experts of a stored generator, of which `places` at most are in memory. For one thread that computes."""

    def __init__(self, file: WeightsFile, names: list[list[str]], places: int, dtype: torch.dtype) -> None:
        """`names`: of each layer with experts the names of its stacks in the file, in the order of `ExpertWeights`."""
        self._file, self._names, self._dtype = file, names, dtype
        total = len(names) * file.entries[names[0][0]].shape[0]
        self.places, self.counts = min(places, total), ExpertCounts()
        self._most_kept = self.places if places >= total else self.places - PASSING
        assert self._most_kept > 0
        self._kept: dict[Key, Place] = {}
        self._passing: dict[Key, Place] = {}
        self._using: Key | None = None
        self._wanted: deque[Key] = deque()  # what will be used, in this order
        self._ahead: set[Key] = set()  # those of them that are read already, or are being read
        self._last: dict[int, list[int]] = {}  # of each layer, what the code before used
        self._uses: Counter[Key] = Counter()
        self._raw: dict[str, Tensor] = {}  # one expert as it is stored, where that is another dtype
        # it runs one read after another, so a place can be given away while it is still being filled
        self._reader = ThreadPoolExecutor(1, "experts")

    @property
    def bytes(self) -> int:
        """Bytes of experts in memory at most."""
        return self.places * sum(self._sizes())

    def begin(self, layer: int, experts: list[int]) -> None:
        """A layer will use these experts, in this order: start to read them, and then the next layer's."""
        following = (layer + 1) % len(self._names)
        self._last[layer] = experts
        self._using = None
        self._wanted = deque((layer, expert) for expert in experts)
        self._wanted.extend((following, expert) for expert in self._last.get(following, []))
        self._ahead &= set(self._wanted)
        self._read_ahead()

    def get(self, layer: int, expert: int) -> ExpertWeights:
        """The weights of an expert, valid until the next call."""
        key = self._using = (layer, expert)
        self._uses[key] += 1
        with suppress(ValueError):
            self._wanted.remove(key)
        if key in self._kept:
            self.counts.kept += 1
            place = self._kept[key]
        else:
            place = self._passing.get(key) or self._read(key, self._free_place() or self._take_back())
            self._ahead.discard(key)
            assert place.loaded is not None
            if place.loaded.done():
                self.counts.ahead += 1
            else:
                self.counts.waited += 1
            place.loaded.result()
            self._keep(key)
        self._read_ahead()
        return ExpertWeights(*place.weights)

    def _keep(self, key: Key) -> None:
        """Let an expert stay that was read, if there is room, or one that was used less."""
        if len(self._kept) >= self._most_kept:
            least = min(self._kept, key=lambda one: self._uses[one])
            if self._uses[key] <= self._uses[least] + MARGIN:
                return
            self._passing[least] = self._kept.pop(least)
        self._kept[key] = self._passing.pop(key)

    def _read_ahead(self) -> None:
        for key in self._wanted:
            if key not in self._kept and key not in self._passing:
                place = self._free_place()
                if place is None:
                    return
                self._read(key, place)
            if key in self._passing:
                self._ahead.add(key)

    def _free_place(self) -> Place | None:
        """A place for an expert: a new one, or that of one which is not needed soon; None if there is none."""
        if len(self._kept) + len(self._passing) < self.places:
            return self._make_place()
        free = next((key for key in self._passing if key != self._using and key not in self._ahead), None)
        return None if free is None else self._passing.pop(free)

    def _take_back(self) -> Place:
        """The place of the expert that is needed last of those read ahead."""
        last = next(key for key in reversed([*self._passing]) if key != self._using)
        self._ahead.discard(last)
        return self._passing.pop(last)

    def _read(self, key: Key, place: Place) -> Place:
        place.loaded = self._reader.submit(self._fill, key, place)
        self._passing[key] = place
        return place

    def _fill(self, key: Key, place: Place) -> None:
        layer, expert = key
        place.weights = []
        for name, memory in zip(self._names[layer], place.bytes, strict=True):
            entry = self._file.entries[name]
            shape, same = entry.shape[1:], entry.dtype == self._dtype
            numbers = math.prod(shape)
            start = entry.start + expert * numbers * entry.dtype.itemsize
            # a mapped file begins at a page, and a converted tensor at a cache line
            wanted = start if same else expert * numbers * self._dtype.itemsize
            first = (wanted - memory.data_ptr()) % ALIGNMENT
            weights = memory[first : first + numbers * self._dtype.itemsize].view(self._dtype).view(shape)
            if same:
                self._file.read_into(start, weights)
            else:
                if name.rpartition(".")[2] not in self._raw:
                    self._raw[name.rpartition(".")[2]] = torch.empty(shape, dtype=entry.dtype)
                raw = self._raw[name.rpartition(".")[2]]
                self._file.read_into(start, raw)
                weights.copy_(raw)
            place.weights.append(weights)

    def _make_place(self) -> Place:
        return Place([torch.empty(size + ALIGNMENT, dtype=torch.uint8) for size in self._sizes()], [])

    def _sizes(self) -> list[int]:
        return [math.prod(self._file.entries[name].shape[1:]) * self._dtype.itemsize for name in self._names[0]]


class LayerMemory:
    """The `ExpertSource` of one layer."""

    def __init__(self, memory: ExpertMemory, layer: int) -> None:
        self.memory, self._layer = memory, layer

    @property
    def bytes(self) -> int:
        """See `ExpertSource`."""
        return self.memory.bytes

    def begin(self, experts: list[int]) -> None:
        """See `ExpertSource`."""
        self.memory.begin(self._layer, experts)

    def get(self, expert: int) -> ExpertWeights:
        """See `ExpertSource`."""
        return self.memory.get(self._layer, expert)

    def __deepcopy__(self, memo: object) -> LayerMemory:
        """A copy of a model reads the same file into the same memory."""
        return self


def open_generator(folder: Path, budget: int, dtype: torch.dtype) -> tuple[Transformer, str]:
    """The generator in a folder, in `dtype` and eval mode, its experts in the file but for `budget` bytes; its hash.

    The hash is its `vqvae.storage.parts.content_hash`. Raises `ModelError` for a generator without experts or a
    damaged one, and `ValueError` for a budget that is too small to work with.
    """
    file = WeightsFile(folder / "model.safetensors")
    model = read_empty_part(Transformer, folder)
    if not model.config.experts.used:
        raise ModelError(f"{folder} has no experts: leave out --expert-memory")
    check_names(model, file.entries, folder)
    one = expert_bytes(model.config, dtype)
    places = budget // one
    if places <= PASSING:
        raise ValueError(
            f"--expert-memory: an expert of this model takes {one / 1e6:.1f} MB, and {PASSING + 1} are the least: "
            f"give {math.ceil((PASSING + 1) * one / 1e6)}MB or more"
        )
    layers, names = [], []
    for name, layer in model.named_modules():
        if isinstance(layer, Experts):
            stacks = [part for part in STACKS if getattr(layer, part) is not None]
            names.append([f"{name}.{part}" for part in stacks])
            layers.append(layer)
            for part in stacks:
                setattr(layer, part, None)
    memory = ExpertMemory(file, names, places, dtype)
    for number, layer in enumerate(layers):
        layer.memory = LayerMemory(memory, number)
    model.load_state_dict({name: file.read(name) for name in model.state_dict()}, assign=True)
    return model.to(dtype).eval(), file.content_hash()
