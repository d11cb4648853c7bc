"""How a code is drawn from its logits: the one description of the options. Imports nothing heavy.

The command line, the recipe in a PNG, the HTTP schema and the demo's controls are made from the fields of
`SamplingOptions`: a new option is a new field here, and its effect in `generation.drawing.logits`.
"""

from __future__ import annotations

from dataclasses import dataclass

from data.options import check_options, option

LEAST_TEMPERATURE = 0.01  # logits are divided by it


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Guidance first, then temperature, then top-k, top-p and min-p. Raises `ValueError` for a value out of range.

    `window` changes the time and never the picture (`generation.drawing.jacobi`).
    """

    temperature: float = option(
        1.0, "How varied the pictures are: 0 always takes the likeliest code; else 0.01 to 100.", least=0, most=100
    )
    top_k: int = option(0, "Sample from the k likeliest codes only; 0 samples from all.", least=0, most=2**31 - 1)
    top_p: float = option(
        0.0, "Sample from the likeliest codes that together have this probability; 0 samples from all.", least=0, most=1
    )
    # Nguyen et al. 2024, arXiv:2407.01082
    min_p: float = option(
        0.0, "Leave out codes less likely than this share of the likeliest one; 0 leaves out none.", least=0, most=1
    )
    guidance: float = option(1.0, "How closely the picture follows the prompt; 1 is no guidance.", least=0, most=100)
    window: int = option(
        1, "Try this many codes in one pass: the same picture, sooner where a pass costs little.", least=1, most=2**16
    )

    def __post_init__(self) -> None:
        check_options(self)
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature must be 0 (greedy) or at least {LEAST_TEMPERATURE}, because logits are divided by it: "
                f"not {self.temperature}"
            )
