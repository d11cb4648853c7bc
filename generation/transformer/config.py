"""What a transformer is made of: sizes and choices, with a preset for each of two structures.

`TransformerConfig.cogview` is that of CogView (Ding et al. 2021, arXiv:2105.13290, section 2: Sandwich-LN, GELU,
learned 1-D positions), `TransformerConfig.modern` has RMSNorm, rotary 2-D positions, QK-norm and SwiGLU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from generation.rows.row import COMMANDS_IN_ROW, PositionKind
from generation.rows.vocabulary import Vocabulary


@dataclass
class TransformerConfig:
    """Sizes and choices. `max_text` counts text pieces, `grid` is (h, w) of the largest picture in codes."""

    num_image_codes: int = 1024
    num_text_pieces: int = 4096
    width: int = 384
    depth: int = 8
    heads: int = 6
    max_text: int = 48
    grid: tuple[int, int] = (16, 16)
    norm: Literal["layernorm", "rmsnorm", "max_scaled_layernorm"] = "rmsnorm"  # the last: see MaxScaledLayerNorm
    norm_eps: float = 1e-5
    sandwich: bool = False  # a second norm after each branch, before it is added (CogView section 2.4)
    mlp: Literal["gelu", "swiglu"] = "swiglu"
    mlp_width: int = 0  # 0: 4 x width for gelu; 8/3 x width, rounded to 64, for swiglu (the same parameter count)
    position: Literal["sequence", "learned_2d", "rotary_2d"] = "rotary_2d"
    rotary_base: float = 10000.0
    qk_norm: bool = True
    pb_relax: float = 0.0  # alpha of precision-bottleneck relaxation; 0: plain attention
    # attention over three regions (`generation.transformer.sparse`) in training; 0: dense, as it always is in eval mode
    sparse_window: int = 0
    sparse_windows: int = 4  # the published settings: 64, 4, 256
    sparse_pivots: int = 256
    bias: bool = False
    dropout: float = 0.0
    tie_embeddings: bool = True
    image_softmax: Literal["codes", "full"] = "codes"  # the softmax of the image loss: over N codes, or over V ids
    tokenizer_hash: str = ""  # content hashes of the parts this model was trained with
    text_hash: str = ""

    def __post_init__(self) -> None:
        height, width = self.grid
        self.grid = (int(height), int(width))  # JSON has only lists
        if min(self.width, self.depth, self.heads, self.num_image_codes, self.num_text_pieces, *self.grid) < 1:
            raise ValueError("width, depth, heads, grid and both vocabulary sizes must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}")
        if self.position == "rotary_2d" and self.head_width % 4:
            raise ValueError(f"rotary_2d needs width / heads to be a multiple of 4, not {self.head_width}")
        if self.max_text < 0 or self.pb_relax < 0 or not 0 <= self.dropout < 1:
            raise ValueError("max_text and pb_relax must not be negative, and dropout must lie in [0, 1)")
        if self.sparse_window < 0 or min(self.sparse_windows, self.sparse_pivots) < 1:
            raise ValueError("sparse_window must be 0 (dense) or more, sparse_windows and sparse_pivots at least 1")

    @classmethod
    def cogview(cls, **overrides: Any) -> TransformerConfig:
        """The structure of CogView: Sandwich-LN, LayerNorm, GELU (tanh), learned 1-D positions, biases, tied."""
        preset = {
            "norm": "layernorm",
            "sandwich": True,
            "mlp": "gelu",
            "position": "sequence",
            "qk_norm": False,
            "bias": True,
            "tie_embeddings": True,
        }
        return cls(**{**preset, **overrides})

    @classmethod
    def modern(cls, **overrides: Any) -> TransformerConfig:
        """RMSNorm before each branch, rotary 2-D positions, QK-norm, SwiGLU, no biases, tied."""
        preset = {
            "norm": "rmsnorm",
            "sandwich": False,
            "mlp": "swiglu",
            "position": "rotary_2d",
            "qk_norm": True,
            "bias": False,
            "tie_embeddings": True,
        }
        return cls(**{**preset, **overrides})

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.num_image_codes, self.num_text_pieces)

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden_width(self) -> int:
        """Width inside the MLP."""
        if self.mlp_width:
            return self.mlp_width
        return 4 * self.width if self.mlp == "gelu" else max(64, round(self.width * 8 / 3 / 64) * 64)

    @property
    def max_length(self) -> int:
        """Tokens of the longest row, [EOI1] included."""
        return self.max_text + self.grid[0] * self.grid[1] + COMMANDS_IN_ROW

    @property
    def position_kind(self) -> PositionKind:
        """Which positions the rows need (`rows.draw.row_positions`)."""
        return "sequence" if self.position == "sequence" else "grid"

    @property
    def num_positions(self) -> int:
        """Entries of a position table: along the row, or along each of the two axes."""
        if self.position == "sequence":
            return self.max_length
        return self.max_text + COMMANDS_IN_ROW + max(self.grid) + 1
