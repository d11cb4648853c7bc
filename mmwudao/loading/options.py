"""How a model runs, and how it chooses among what it draws: options that several doors share. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data.options import check_options, option

JudgeName = Literal["caption", "towers", "both"]  # as in `mmwudao.tasks`, which imports PyTorch
VectorMaker = Literal["towers", "generator"]
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
    expert_memory: str | None = option(
        None, "Keep so much of a generator's experts in memory, such as 256MB, and leave the others in its file."
    )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How a model chooses among what it draws, unless it is told otherwise; it is part of the model's config.json.

    CogView draws 60 pictures and keeps the best (Ding et al. 2021, arXiv:2105.13290, section 3.3). Raises `ValueError`
    for a number out of range.
    """

    candidates: int = option(
        1, "Draw this many pictures for each that is asked for, and keep the best.", least=1, most=60
    )
    judge: JudgeName = option(
        "caption", "The candidates are judged by their captions, by the model's towers, or by both."
    )

    def __post_init__(self) -> None:
        check_options(self)
