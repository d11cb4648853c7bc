"""What a transformer is made of: sizes and choices, with a preset for each of two structures.

`TransformerConfig.cogview` is that of CogView (Ding et al. 2021, arXiv:2105.13290, section 2: Sandwich-LN, GELU,
learned 1-D positions), `TransformerConfig.modern` has RMSNorm, rotary 2-D positions, QK-norm and SwiGLU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from data.config import LATER
from data.options import DEPTH, WIDTH, check_options, option
from generation.rows.frame import PromptFrame
from generation.rows.row import COMMANDS_IN_ROW, PositionKind
from generation.rows.vocabulary import Vocabulary
from generation.transformer.experts import ExpertOptions
from generation.transformer.match_head import MatchOptions
from generation.transformer.prompt_features import PromptFeatures


@dataclass
class TransformerConfig:
    """Sizes and choices. `max_text` counts text pieces, `grid` is (h, w) of the largest picture in codes."""

    num_image_codes: int = option(1024, "How many codes there are for pictures.", least=1, most=2**20)
    num_text_pieces: int = option(4096, "How many pieces there are for text.", least=1, most=2**22)
    width: int = option(384, "The width of the layers.", least=1, most=WIDTH)
    depth: int = option(8, "How many blocks there are.", least=1, most=DEPTH)
    heads: int = option(6, "Attention heads of a block.", least=1, most=DEPTH)
    # Ainslie et al. 2023, arXiv:2305.13245
    kv_heads: int = option(
        0, "Heads of keys and values, each shared by several of the queries; 0: as many as heads.", least=0, most=DEPTH
    )
    max_text: int = option(48, "Text pieces of a row at most.", least=0, most=2**16)
    grid: tuple[int, int] = option((16, 16), "Height and width of the largest picture in codes.", least=1, most=1024)
    norm: Literal["layernorm", "rmsnorm", "max_scaled_layernorm"] = "rmsnorm"  # the last: see MaxScaledLayerNorm
    norm_eps: float = option(1e-5, "What norms add to the variance.", above=0, most=1)
    sandwich: bool = False  # a second norm after each branch, before it is added (CogView section 2.4)
    mlp: Literal["gelu", "swiglu"] = "swiglu"
    # the two defaults have the same parameter count
    mlp_width: int = option(
        0, "Width inside the MLP; 0: 4 x width for gelu; 8/3 x width, rounded to 64, for swiglu.",
        least=0, most=8 * WIDTH,
    )  # fmt: skip
    # rotary_codes: as rotary_2d for the codes; text has no angle, and its queries and keys become zeros
    position: Literal["sequence", "learned_2d", "rotary_2d", "rotary_1d", "rotary_codes"] = "rotary_2d"
    rotary_base: float = option(10000.0, "The base of the rotary positions' wavelengths.", above=1, most=1e12)
    qk_norm: bool = True
    pb_relax: float = option(0.0, "Alpha of precision-bottleneck relaxation; 0: plain attention.", least=0, most=1e6)
    # `generation.transformer.sparse`; the published settings are 64, 4, 256
    sparse_window: int = option(
        0, "Tokens of a window of sparse attention in training; 0: dense, as it always is in eval mode.",
        least=0, most=2**16,
    )  # fmt: skip
    sparse_windows: int = option(4, "Windows that a token sees where attention is sparse.", least=1, most=2**16)
    sparse_pivots: int = option(256, "Pivots that a token sees where attention is sparse.", least=1, most=2**16)
    bias: bool = False
    dropout: float = option(0.0, "The share of activations that training drops.", least=0, below=1)
    tie_embeddings: bool = True
    # codes: Linear to the codes alone; mlp: Linear, GELU (erf), Linear, with biases, to them: such models draw and
    # tell nothing of text
    image_head: Literal["linear", "codes", "mlp"] = "linear"
    image_softmax: Literal["codes", "full"] = "codes"  # the softmax of the image loss: over N codes, or over V ids
    tokenizer_hash: str = ""  # content hashes of the parts this model was trained with
    text_hash: str = ""
    prompt_features: PromptFeatures = field(default_factory=PromptFeatures)
    # `generation.transformer.prompt_features.PrefixMap`
    prefix_width: int = option(
        0, "Numbers in each of the vectors that are the prompt; 0: it is text pieces.", least=0, most=WIDTH
    )
    frame: PromptFrame = field(default_factory=PromptFrame)
    row_end: int = option(
        -1, "The raw text piece that follows each row of codes but the last, and is not sampled; -1: none.",
        least=-1, most=2**22,
    )  # fmt: skip
    # `generation.drawing.noise`: a table of all places at once, or place by place; each draws other pictures
    noise: Literal["table", "counter"] = "table"
    block_rows: int = option(
        16, "Rows that are drawn side by side at most; a guided picture takes two.", least=2, most=16
    )
    fills: bool = False  # was trained on rows with holes, so that any codes may be given
    experts: ExpertOptions = field(default_factory=ExpertOptions, metadata=LATER)
    match: MatchOptions = field(default_factory=MatchOptions, metadata=LATER)  # vectors of texts and pictures

    def __post_init__(self) -> None:
        check_options(self)
        height, width = self.grid
        self.grid = (int(height), int(width))  # JSON has only lists
        if isinstance(self.prompt_features, dict):  # and dictionaries
            self.prompt_features = PromptFeatures(**self.prompt_features)
        if isinstance(self.frame, dict):
            self.frame = PromptFrame(**self.frame)
        if isinstance(self.experts, dict):
            self.experts = ExpertOptions(**self.experts)
        if isinstance(self.match, dict):
            self.match = MatchOptions(**self.match)
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}")
        if self.position in ("rotary_2d", "rotary_codes") and self.head_width % 4:
            raise ValueError(f"{self.position} needs width / heads to be a multiple of 4, not {self.head_width}")
        if self.position == "rotary_1d" and self.head_width % 2:
            raise ValueError(f"rotary_1d needs width / heads to be even, not {self.head_width}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
        if self.prefix_width and (self.prompt_features.used or not self.frame.own):
            raise ValueError("vectors that are the prompt need a frame of their own and no prompt_features")
        if self.image_head == "codes" and self.tie_embeddings:
            raise ValueError("image_head codes has a matrix of its own: tie_embeddings must be false")
        if self.row_end >= self.num_text_pieces or (self.row_end >= 0 and self.position_kind != "sequence"):
            raise ValueError("row_end must be a text piece, of a model whose positions count along the row")
        if self.noise not in ("table", "counter"):
            raise ValueError(f"noise must be table or counter, not {self.noise!r}")
        if self.frame.own and self.frame.highest >= self.num_text_pieces:
            raise ValueError(f"the marks of the frame must be text pieces, below {self.num_text_pieces}")
        if self.experts.used and self.experts.every > self.depth:
            raise ValueError(f"experts.every={self.experts.every}: with depth={self.depth} no block would have experts")
        if self.match.used and self.frame.own:
            raise ValueError("match.width is for a model whose rows are ours: leave it out beside a frame of its own")

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
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def hidden_width(self) -> int:
        """Width inside the MLP."""
        if self.mlp_width:
            return self.mlp_width
        return 4 * self.width if self.mlp == "gelu" else max(64, round(self.width * 8 / 3 / 64) * 64)

    @property
    def max_length(self) -> int:
        """Tokens of the longest row, [EOI1] included."""
        return self.max_text + self.places(self.grid) + COMMANDS_IN_ROW

    def places(self, grid: tuple[int, int]) -> int:
        """Places that a picture of `grid` codes takes in a row, the ends of its rows included."""
        return grid[0] * grid[1] + (grid[0] - 1 if self.row_end >= 0 else 0)

    @property
    def position_kind(self) -> PositionKind:
        """Which positions the rows need (`rows.draw.row_positions`)."""
        if self.position == "rotary_codes":
            return "codes"
        return "sequence" if self.position in ("sequence", "rotary_1d") else "grid"

    @property
    def num_positions(self) -> int:
        """Entries of a position table: along the row, or along each of the two axes."""
        if self.position_kind == "sequence":
            return self.max_length
        if self.position_kind == "codes":
            return max(self.grid) + 2
        return self.max_text + COMMANDS_IN_ROW + max(self.grid) + 1
