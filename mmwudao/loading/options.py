"""How a model runs: the options that commands and the service share. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data.options import option

EngineName = Literal["auto", "modules", "fused", "graph", "compile"]  # as in `generation.drawing.engines`


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a model runs, in which number format, in which style, and how a step of drawing is run."""

    adapter: str | None = option(None, "Draw in the style in this folder, which `mmwudao train style` wrote.")
    device: str = option("auto", "The model runs on this device: auto, cpu, cuda or mps.")
    dtype: str = option(
        "auto", "The model computes in auto, float32, bfloat16 or float16; int8 is auto with weights of 8 bits."
    )
    engine: EngineName = option(
        "auto",
        "A step of drawing is run this way; on a GPU graph is faster than auto, and compile is faster still but takes "
        "a minute first.",
    )
