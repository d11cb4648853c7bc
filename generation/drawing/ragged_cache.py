"""A cache for prompts of any lengths without padding: every row begins at slot 0, and its codes follow its own prompt.

Slots that a row has not reached yet are masked. On CUDA with xformers (extra `gpu`), its split-K kernel computes the
attention of one query a row and reads no slot behind the row's last; elsewhere PyTorch's kernel reads as far as the
longest row, with a mask. The bits of a row may depend on the others here; with the padded prompts of
`generation.drawing.decoding` they do not.

Shapes: R rows, P tokens of the longest prompt, T slots, H heads, d head width.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from generation.drawing.window_cache import WindowCache
from generation.transformer.config import TransformerConfig


class RaggedCache(WindowCache):
    """A `WindowCache` whose prompts come without the padding, `hidden` [R, T], that stands left of them.

    Without `kernels`, attention is PyTorch's everywhere, which torch.compile can trace.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden: Tensor,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        kernels: bool = True,
    ) -> None:
        super().__init__(config, torch.zeros_like(hidden), dtype=dtype, device=device)
        # in memory: rows, slots, heads, which xformers reads as rows behind one another
        layers, rows, heads, slots, width = self.keys.shape
        shape = (layers, rows, slots, heads, width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device).transpose(2, 3)
        self.values = torch.zeros_like(self.keys)
        self.padding = torch.zeros_like(self.starts)  # [R], left of each prompt
        self.begin(hidden)
        self._mask: Any = None
        halves = dtype in (torch.float16, torch.bfloat16)
        shared = config.key_heads != config.heads  # which the kernel would need in another layout
        on_gpu = self.keys.device.type == "cuda" and halves and not (config.pb_relax or shared)
        if kernels and on_gpu and _xformers_installed():
            from xformers.ops.fmha.attn_bias import BlockDiagonalCausalWithOffsetPaddedKeysMask

            self._mask = BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
                q_seqlen=[1] * rows, kv_padding=slots, kv_seqlen=[slots] * rows
            ).to(self.keys.device)

    def begin(self, hidden: Tensor) -> None:
        """Start with other prompts: what is stored is masked from now on."""
        padding = hidden.sum(dim=1)
        self.padding.copy_(padding)
        self.least_padding = int(padding.min())
        self.starts.zero_()
        self.reach = self.length

    def align(self, tokens: Tensor) -> Tensor:
        """[R, P] or [R, P, 2] padded on the left, as in `PaddedPrompts`, to the same padded on the right."""
        places = torch.arange(tokens.shape[1], device=tokens.device) + self.padding[:, None]
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        return tokens[rows, places % tokens.shape[1]]

    def move_to(self, slot: int) -> None:
        """Put the next token of every row where it belongs without padding; `slot` is its place with padded prompts."""
        self.starts.copy_(slot - self.padding)

    def attend(self, layer: int, q: Tensor) -> Tensor | None:
        if self._mask is None or q.shape[2] != 1:
            return None
        from xformers.ops import fmha

        rows, heads, _, width = q.shape
        keys, values = (x[layer].transpose(1, 2).reshape(1, -1, heads, width) for x in (self.keys, self.values))
        self._mask.k_seqinfo.seqlen.copy_(self.starts + 1)
        mixed: Tensor = fmha.memory_efficient_attention_forward(
            q.transpose(1, 2).reshape(1, rows, heads, width), keys, values, self._mask, op=fmha.triton_splitk.FwOp
        )
        return mixed.view(rows, 1, heads, width).transpose(1, 2)


@cache
def _xformers_installed() -> bool:
    return find_spec("xformers") is not None
