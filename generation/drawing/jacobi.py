"""Drawing several codes in one pass of the model: Jacobi decoding of a sampler whose noise is fixed beforehand.

A code is the argmax of its logits plus noise that belongs to the seed and the place (`logits.sample`). So a picture
is the one solution of S equations, each code from those before it, and can be found by iterating on a window of them at
once (Song et al. 2021, arXiv:2002.03629): a code is final when those before it are. As the noise stays while they
change, most guesses survive, and what comes out is the very picture that drawing code by code gives. The speculative
Jacobi decoding of Teng et al. (2024, arXiv:2410.01699) keeps a guess by chance instead, and redraws with fresh noise.

Shapes: n images, R rows of a block, W codes of the window, S codes of a picture, N image codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from generation.transformer.cache import KVCache
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer


class WindowCache(KVCache):
    """A cache whose rows stand at different places: the next tokens of row r go to the slots from `starts[r]` on.

    What lies there is overwritten. Keys and values of the first `reach` slots are returned, those behind the tokens
    masked: with an end where the foremost row is, the bits of a row would depend on the others.
    """

    def __init__(self, config: TransformerConfig, hidden: Tensor, *, dtype: torch.dtype, device: torch.device | str):
        super().__init__(config, hidden, dtype=dtype, device=device)
        self.starts = torch.zeros(len(hidden), dtype=torch.int64, device=device)  # [R], to be set before each pass
        self.reach = self.length

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        slots = self._slots(k.shape[2])
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        self.keys[layer][rows, :, slots] = k.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][rows, :, slots] = v.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer, :, :, : self.reach], self.values[layer, :, :, : self.reach]

    def bias(self, new: int) -> Tensor:
        slots = torch.arange(self.reach, device=self.starts.device)
        queries = self._slots(new)[:, None, :, None]  # [R, 1, new, 1]
        bias = self._bias[..., : self.reach].masked_fill(slots > queries, -torch.inf)
        return bias.masked_fill(slots == queries, 0.0)  # as in `KVCache.bias`

    def advance(self, new: int) -> None:
        """Nothing: `starts` says where the next tokens go."""

    def row(self, number: int) -> WindowCache:
        part = super().row(number)
        assert isinstance(part, WindowCache)
        part.starts = self.starts[number : number + 1]
        return part

    def _slots(self, new: int) -> Tensor:
        """[R, new]"""
        return self.starts[:, None] + torch.arange(new, device=self.starts.device)


def draw_by_windows(
    model: Transformer,
    cache: WindowCache,
    tokens: Tensor,
    positions: Tensor,
    codes: Tensor,
    window: int,
    row_width: int,
    choose: Callable[[Tensor, Tensor], Tensor],
    on_pass: Callable[[int], None],
) -> None:
    """Fill the gaps (-1) of `codes` [n, S], in as many passes as it takes, each over `window` places of every row.

    `tokens` [R, P] are the prompts up to and with [BOI1], `positions` those of the prompts and codes; rows n, n + 1,
    ... repeat the images without their prompt. `choose(logits [R, W, N], places [n, W])` gives the codes [n, W] there.
    `on_pass` is told how many codes are final in all images.
    """
    count, steps = codes.shape
    repeats, slots = len(tokens) // count, tokens.shape[1]
    window = min(window, steps)
    known, draft = codes >= 0, codes.clamp_min(0)
    least = int(known.all(dim=0).int().cumprod(dim=0).sum())  # given in all pictures
    final = torch.full((count,), least, device=codes.device)  # codes that cannot change any more
    reached = final  # places before it have had a guess
    offsets = torch.arange(window, device=codes.device)
    begin = tokens[:, -1:]  # [BOI1], after which the first code comes
    model(tokens[:, :-1], positions[:, : slots - 1], cache)
    if least:
        cache.starts = cache.starts + slots - 1
        given = torch.cat([begin, draft[:, : least - 1].repeat(repeats, 1)], dim=1)
        model(given, positions[:, slots - 1 : slots - 1 + least], cache)
    while least < steps:
        first = final.clamp_max(steps - window)  # a row that is done goes over its end again
        places = first[:, None] + offsets
        _guess(draft, known, places, reached, row_width)
        before = torch.cat([begin[:count], draft[:, :-1]], dim=1).gather(1, places)
        cache.starts = (first + slots - 1).repeat(repeats)
        rows = torch.arange(len(tokens), device=codes.device)[:, None]
        here = positions[rows, cache.starts[:, None] + offsets]
        hidden = model(before.repeat(repeats, 1), here, cache)
        old = draft.gather(1, places)
        new = choose(model.logits(hidden, image_only=True).float(), places)
        new = torch.where(known.gather(1, places) | (places < final[:, None]), old, new)
        draft.scatter_(1, places, new)
        agreed = (new == old).int().cumprod(dim=1).sum(dim=1)
        # the first code that changed is right already: all before it were
        final, reached = (first + agreed + 1).clamp_max(first + window), first + window
        least = int(final.min())
        codes.copy_(torch.where(torch.arange(steps, device=codes.device) < final[:, None], draft, codes))
        on_pass(least)


def _guess(draft: Tensor, known: Tensor, places: Tensor, reached: Tensor, row_width: int) -> None:
    """A first guess where the window comes for the first time: the code above, which beats chance by far."""
    rows_up = (places - reached[:, None]).div(row_width, rounding_mode="floor") + 1  # to one that has had its guess
    above = draft.gather(1, (places - rows_up * row_width).clamp_min(0))
    fresh = (places >= reached[:, None]) & ~known.gather(1, places)
    draft.scatter_(1, places, torch.where(fresh, above, draft.gather(1, places)))
