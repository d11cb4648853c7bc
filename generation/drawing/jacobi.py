"""Drawing several codes in one pass of the model: Jacobi decoding of a sampler whose noise is fixed beforehand.

A code is the argmax of its logits plus noise that belongs to the seed and the place (`logits.sample`). So a picture
is the only solution of S equations, each of which gives a code from those before it, and iterating on a window of codes
at once finds it (Song et al. 2021, arXiv:2002.03629): a code is final when those before it are. Because the noise stays
the same, most guesses survive, and the result is exactly the picture that drawing code by code gives. The speculative
Jacobi decoding of Teng et al. (2024, arXiv:2410.01699) keeps a guess by chance instead, and redraws with fresh noise.

Shapes: n images, R rows of a block, W codes of the window, S places of a picture, N image codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from generation.drawing.prompts import PaddedPrompts
from generation.drawing.window_cache import WindowCache
from generation.transformer.model import Transformer


@dataclass(frozen=True)
class Windows:
    """How a block is drawn by windows of `size` codes, of pictures with so many places from a code to that below."""

    size: int
    row_width: int
    choose: Callable[[Tensor, Tensor], Tensor]  # (logits [R, W, N], places [n, W]) to the codes [n, W] there
    on_pass: Callable[[int], None]  # told after each pass how many codes are final in all images


def draw_by_windows(
    model: Transformer, cache: WindowCache, prompts: PaddedPrompts, codes: Tensor, windows: Windows
) -> None:
    """Fill the gaps (-1) of `codes` [n, S], in as many passes as it takes, each over `windows.size` places of each row.

    The first n of the prompts are those of the images; rows n, n + 1, ... repeat the images without their prompt.
    """
    tokens, positions = prompts.tokens, prompts.positions
    count, steps = codes.shape
    repeats, slots = len(tokens) // count, prompts.slots
    window = min(windows.size, steps)
    known, draft = codes >= 0, codes.clamp_min(0)
    least = int(known.all(dim=0).int().cumprod(dim=0).sum())  # given in all pictures
    final = torch.full((count,), least, device=codes.device)  # codes that cannot change any more
    reached = final  # places before it have had a guess
    offsets = torch.arange(window, device=codes.device)
    begin = tokens[:, -1:]  # [BOI1], after which the first code comes
    vectors, last = prompts.split_vectors()
    if slots > 1:
        model(tokens[:, :-1], positions[:, : slots - 1], cache, features=vectors)
    if least:
        cache.starts = cache.starts + slots - 1
        given = torch.cat([begin, draft[:, : least - 1].repeat(repeats, 1)], dim=1)
        model(
            given,
            positions[:, slots - 1 : slots - 1 + least],
            cache,
            features=None if last is None else torch.cat(last),
        )
    while least < steps:
        first = final.clamp_max(steps - window)  # a finished row repeats its end
        places = first[:, None] + offsets
        _guess(draft, known, places, reached, windows.row_width)
        # the last token of a prompt may be another one in the row without it
        before = torch.cat([begin, draft[:, :-1].repeat(repeats, 1)], dim=1).gather(1, places.repeat(repeats, 1))
        cache.starts = (first + slots - 1).repeat(repeats)
        rows = torch.arange(len(tokens), device=codes.device)[:, None]
        here = positions[rows, cache.starts[:, None] + offsets]
        hidden = model(before, here, cache, features=_at_begin(last, (first == 0).repeat(repeats).tolist()))
        old = draft.gather(1, places)
        new = windows.choose(model.logits(hidden, image_only=True).float(), places)
        new = torch.where(known.gather(1, places) | (places < final[:, None]), old, new)
        draft.scatter_(1, places, new)
        agreed = (new == old).int().cumprod(dim=1).sum(dim=1)
        # the first code that changed is right already: all before it were
        final, reached = (first + agreed + 1).clamp_max(first + window), first + window
        least = int(final.min())
        codes.copy_(torch.where(torch.arange(steps, device=codes.device) < final[:, None], draft, codes))
        windows.on_pass(least)


def _at_begin(last: tuple[Tensor, ...] | None, at: list[bool]) -> Tensor | None:
    """The vectors of the last tokens of those prompts that the rows' windows begin with."""
    return (
        None if last is None else torch.cat([one for one, here in zip(last, at, strict=True) if here] or [last[0][:0]])
    )


def _guess(draft: Tensor, known: Tensor, places: Tensor, reached: Tensor, row_width: int) -> None:
    """A first guess where the window comes for the first time: the code above, which is far better than chance."""
    rows_up = (places - reached[:, None]).div(
        row_width, rounding_mode="floor"
    ) + 1  # to a row that has its guess already
    above = draft.gather(1, (places - rows_up * row_width).clamp_min(0))
    fresh = (places >= reached[:, None]) & ~known.gather(1, places)
    draft.scatter_(1, places, torch.where(fresh, above, draft.gather(1, places)))
