"""Pictures of several clients in one decoding batch; each client may leave, or get previews."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from mmwudao.canvas import Canvas
from mmwudao.pipeline import Pipeline
from mmwudao.planning import Drawing
from mmwudao.service.errors import ClientsGone


@dataclass
class DrawRequest:
    """A picture that a client waits for. `gone` may be set at any time, from any thread.

    `preview(image)` is called in the drawing thread after each of `preview_rows` rows of codes. The picture completes
    the `canvas`, if there is one; the codes that it gives are not counted as rows.
    """

    drawing: Drawing
    preview: Callable[[Image.Image], None] | None = None
    preview_rows: frozenset[int] = frozenset()
    gone: bool = False
    canvas: Canvas | None = None

    @property
    def key(self) -> Hashable:
        """Pictures of the same key may be drawn together."""
        return self.drawing.options, self.canvas


def rows_of_previews(count: int, height: int) -> frozenset[int]:
    """After which of `height` rows `count` previews are sent: evenly spread, and none after the last row."""
    return frozenset(round(height * k / (count + 1)) for k in range(1, count + 1)) - {0, height}


def until_gone() -> tuple[threading.Event, Callable[[], None]]:
    """An event for a client that has left, and a function that raises `ClientsGone` once it is set."""
    gone = threading.Event()

    def on_step() -> None:
        if gone.is_set():
            raise ClientsGone

    return gone, on_step


def draw_block(pipeline: Pipeline, block: Sequence[DrawRequest]) -> list[Image.Image]:
    """Draw pictures of the same `key`, at most a block of `generate_codes`.

    Raises `ClientsGone` at the first step at which every client has left.
    """
    width, before, canvas = pipeline.grid[1], 0, block[0].canvas

    def on_token(step: int, codes: Tensor) -> None:
        nonlocal before
        if all(one.gone for one in block):
            raise ClientsGone
        # a pass with a window may end inside a row, or several rows further
        finished = frozenset(range(before + 1, step // width + 1))
        before = step // width
        for k, one in enumerate(block):
            if one.preview is not None and finished & one.preview_rows and not one.gone:
                one.preview(pipeline.decode_partial(codes[k : k + 1], canvas)[0])

    return pipeline.draw([one.drawing for one in block], on_token, canvas)
