"""Drawing several codes in one pass of the model: Jacobi decoding of a sampler whose noise is fixed beforehand.

A code is the argmax of its logits plus noise that belongs to the seed and the place (`logits.sample`). So a picture
is the only solution of S equations, each of which gives a code from those before it, and iterating on a window of codes
at once finds it (Song et al. 2021, arXiv:2002.03629): a code is final when those before it are. Because the noise stays
the same, most guesses survive, and the result is exactly the picture that drawing code by code gives. The speculative
Jacobi decoding of Teng et al. (2024, arXiv:2410.01699) keeps a guess by chance instead, and redraws with fresh noise.

Where a guess is least sure, its rival, the code that was next to it, is tried in the same pass: a branch. If the rival
is right, the code behind it is known as well.

Shapes: n images, R rows of a block, W codes of the window, B branches, S places of a picture, N image codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from generation.drawing.prompts import PaddedPrompts
from generation.drawing.window_cache import WindowCache, branches_of
from generation.transformer.model import Transformer

NATS_A_PLACE = 0.5  # by which a place must be less sure than the one before it to have a branch instead


@dataclass(frozen=True)
class Windows:
    """How a block is drawn by passes over `size` places, of pictures with so many places from a code to that below."""

    size: int
    row_width: int
    score: Callable[[Tensor, Tensor], Tensor]  # (logits [R, T, N], places [n, T]) to what the codes are the argmax of
    on_pass: Callable[[int], None]  # told after each pass how many codes are final in all images


def draw_by_windows(
    model: Transformer, cache: WindowCache, prompts: PaddedPrompts, codes: Tensor, windows: Windows
) -> None:
    """Fill the gaps (-1) of `codes` [n, S], in as many passes as it takes, each over `windows.size` places of each row.

    A quarter of these are branches (`window_cache.branches_of`). The first n of the prompts are those of the images;
    rows n, n + 1, ... repeat the images without their prompt.
    """
    drawing = _Drawing(model, cache, prompts, codes, windows)
    drawing.read_given()
    while drawing.least < codes.shape[1]:
        drawing.run_pass()


class _Drawing:
    """A block that is being drawn: what is guessed, and what is final."""

    def __init__(
        self, model: Transformer, cache: WindowCache, prompts: PaddedPrompts, codes: Tensor, windows: Windows
    ) -> None:
        self._model, self._cache, self._prompts, self._codes, self._windows = model, cache, prompts, codes, windows
        count, self._steps = codes.shape
        size = min(windows.size, self._steps)
        self._branches = branches_of(size)
        self._window = size - self._branches
        self._repeats = len(prompts.tokens) // count
        self._known, self._draft = codes >= 0, codes.clamp_min(0)
        # of each place, by the last pass over it: the code next to the draft, and by how many nats the draft is ahead
        self._rivals = torch.zeros_like(codes)
        self._margins = torch.full(codes.shape, torch.inf, device=codes.device)
        self.least = int(self._known.all(dim=0).int().cumprod(dim=0).sum())  # given in all pictures
        self._final = torch.full((count,), self.least, device=codes.device)  # codes that cannot change any more
        self._reached = self._final  # places before it have had a guess
        self._offsets = torch.arange(self._window, device=codes.device)
        self._begin = prompts.tokens[:, -1:]  # [BOI1], after which the first code comes
        self._vectors, self._last = prompts.split_vectors()

    def read_given(self) -> None:
        """The prompts but for their last tokens; these too, with the codes that all images begin with, if any."""
        slots, positions, least = self._prompts.slots, self._prompts.positions, self.least
        if slots > 1:
            first = self._prompts.tokens[:, :-1]
            self._model(first, positions[:, : slots - 1], self._cache, features=self._vectors)
        if least:
            self._cache.starts = self._cache.starts + slots - 1
            given = torch.cat([self._begin, self._both(self._draft[:, : least - 1])], dim=1)
            features = None if self._last is None else torch.cat(self._last)
            self._model(given, positions[:, slots - 1 : slots - 1 + least], self._cache, features=features)

    def run_pass(self) -> None:
        first = self._final.clamp_max(self._steps - self._window)  # a finished row repeats its end
        places = first[:, None] + self._offsets
        _guess(self._draft, self._known, places, self._reached, self._windows.row_width)
        depths = self._least_sure(places)  # [n, B]
        doubtful = places.gather(1, depths)
        rivals = self._rivals.gather(1, doubtful)
        asked = torch.cat([places, doubtful + 1], dim=1)  # [n, W + B]
        scores = self._scores(first, places, asked, depths, rivals)
        old, drawn = self._draft.gather(1, asked), scores.argmax(-1)
        fixed = self._known.gather(1, asked) | (asked < self._final[:, None])
        drawn = torch.where(fixed, old, drawn)
        agreed = (drawn == old)[:, : self._window].int().cumprod(dim=1).sum(dim=1)
        # the first code that changed is right already: all before it were
        final = (first + agreed + 1).clamp_max(first + self._window)
        self._draft.scatter_(1, places, drawn[:, : self._window])
        if self._branches:
            self._remember(places, scores[:, : self._window], fixed[:, : self._window])
            turn = drawn.gather(1, agreed.clamp_max(self._window - 1)[:, None])
            match = (depths == agreed[:, None]) & (rivals == turn)
            hit, branch = match.any(dim=1), match.int().argmax(dim=1, keepdim=True)
            after, code = doubtful.gather(1, branch) + 1, drawn[:, self._window :].gather(1, branch)
            self._draft.scatter_(1, after, torch.where(hit[:, None], code, self._draft.gather(1, after)))
            self._cache.keep_branch(self._both(hit), self._both(branch)[:, 0])
            final = final + hit.int()
        self._final, self._reached = final, first + self._window
        self.least = int(final.min())
        standing = torch.arange(self._steps, device=final.device) < final[:, None]
        self._codes.copy_(torch.where(standing, self._draft, self._codes))
        self._windows.on_pass(self.least)

    def _scores(self, first: Tensor, places: Tensor, asked: Tensor, depths: Tensor, rivals: Tensor) -> Tensor:
        """What the codes `asked` [n, W + B] are the argmax of [n, W + B, N], by a pass over what is before them."""
        # the last token of a prompt may be another one in the row without it
        row = torch.cat([self._begin, self._both(self._draft[:, :-1])], dim=1)
        before = torch.cat([row.gather(1, self._both(places)), self._both(rivals)], dim=1)
        self._cache.starts = self._both(first + self._prompts.slots - 1)
        if self._branches:
            self._cache.branch_at(self._both(depths))
        rows = torch.arange(len(before), device=before.device)[:, None]
        here = self._prompts.positions[rows, self._both(asked) + self._prompts.slots - 1]
        features = _at_begin(self._last, self._both(first == 0).tolist())
        hidden = self._model(before, here, self._cache, features=features)
        return self._windows.score(self._model.logits(hidden, image_only=True).float(), asked)

    def _least_sure(self, places: Tensor) -> Tensor:
        """Where in the window branches are worth most [n, B]; the code behind the last place is not asked for."""
        doubt = self._margins.gather(1, places) + NATS_A_PLACE * self._offsets
        return doubt[:, :-1].topk(self._branches, dim=1, largest=False).indices

    def _remember(self, places: Tensor, scores: Tensor, fixed: Tensor) -> None:
        """Rivals and margins at `places` [n, W]; what is fixed has none."""
        others = scores.scatter(-1, scores.argmax(-1, keepdim=True), -torch.inf)
        margins = torch.where(fixed, torch.inf, scores.amax(-1) - others.amax(-1))
        self._rivals.scatter_(1, places, others.argmax(-1))
        self._margins.scatter_(1, places, margins)

    def _both(self, x: Tensor) -> Tensor:
        """[n, ...] of the images for all their rows [R, ...]."""
        return x.repeat(self._repeats, *[1] * (x.ndim - 1))


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
