"""Attention over three regions, for training on long rows: text, random pivots, and a window of the latest tokens.

CogView section 2.5 (Ding et al. 2021, arXiv:2105.13290), in the form of the published code (`is_sparse 1`).
Shapes: B rows, H heads, S tokens, d head width, w window, m windows, n pivots, C = ceil(S / w) blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def draw_pivots(tokens: Tensor, num_image_codes: int, padding: int, count: int) -> Tensor:
    """Places [B, n] of the pivots in `tokens` [B, S]: text and commands first, then image codes, chosen at random.

    Padding (at the end of a row) comes last. n is `count`, or S if that is less.
    """
    kind = torch.where(tokens < num_image_codes, 1.0, torch.where(tokens == padding, 0.0, 2.0))
    rank = kind + torch.rand(tokens.shape, device=tokens.device)
    return rank.topk(min(count, tokens.shape[1]), dim=1).indices


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pivots: Tensor, window: int, windows: int, attend: Attend
) -> Tensor:
    """Causal attention [B, H, S, d] to the last `windows` blocks of `window` tokens, and to pivots [B, n] before them.

    A pivot's scores grow by log(S // n), because each stands for that many tokens. `attend(q, k, v, bias)` is dense
    attention, here of each block to its own keys; the bias is 0 or minus infinity or that logarithm.
    """
    rows, heads, length, _ = q.shape
    blocks = -(-length // window)
    right, left = blocks * window - length, (windows - 1) * window
    block = torch.arange(blocks, device=q.device)
    place = torch.arange(blocks * window, device=q.device).view(blocks, window, 1)  # of the queries
    # places of the keys of each block, [C, m w]; those before the row's first token are negative
    near = (block.unsqueeze(1) - windows + 1) * window + torch.arange(windows * window, device=q.device)
    near_hidden = (near.unsqueeze(1) > place) | (near.unsqueeze(1) < 0)  # [C, w, m w]
    far_hidden = pivots.unsqueeze(1) >= (block.view(1, -1, 1) - windows + 1) * window  # [B, C, n]
    # a row shorter than the pivots are many: the original's logarithm of 0 would hide them all
    weight = math.log(max(1, length // pivots.shape[1]))
    bias = torch.cat(
        [
            torch.zeros(rows, *near_hidden.shape, device=q.device).masked_fill_(near_hidden, -torch.inf),
            torch.full((rows, blocks, window, pivots.shape[1]), weight, device=q.device).masked_fill_(
                far_hidden.unsqueeze(2), -torch.inf
            ),
        ],
        dim=-1,
    )  # [B, C, w, m w + n]

    def keys_of_blocks(x: Tensor) -> Tensor:
        """[B, H, S, d] to [B C, H, m w + n, d]."""
        latest = F.pad(x, (0, 0, left, right)).unfold(2, windows * window, window).permute(0, 2, 1, 4, 3)
        chosen = x.gather(2, pivots[:, None, :, None].expand(-1, heads, -1, x.shape[-1]))
        return torch.cat([latest, chosen.unsqueeze(1).expand(-1, blocks, -1, -1, -1)], dim=3).flatten(0, 1)

    queries = F.pad(q, (0, 0, 0, right)).unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)
    mixed = attend(queries, keys_of_blocks(k), keys_of_blocks(v), bias.flatten(0, 1).unsqueeze(1))  # [B C, H, w, d]
    return mixed.unflatten(0, (rows, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]
