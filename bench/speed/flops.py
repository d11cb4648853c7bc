"""What training costs in floating-point operations, and what a device can do: model-FLOPs utilisation (MFU).

The count is that of PaLM's appendix B (Chowdhery et al. 2022, arXiv:2204.02311): matrix products only, where a
multiplication and an addition count as two operations and the backward pass as two forward passes. Padding and what is
computed twice (checkpointed activations) do not count.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from generation.rows.row import RowBatch
from generation.transformer.config import TransformerConfig

# part of the name that `torch.cuda.get_device_name` gives -> FLOP/s of dense bfloat16 products (NVIDIA's data sheets)
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,  # SXM
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward and a backward pass: products with the blocks' matrices, attention, and logits (`head`)."""

    blocks: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.blocks + self.attention + self.head


def training_flops(config: TransformerConfig, batch: RowBatch) -> Flops:
    """FLOPs to learn from a batch, padded or packed, with dense attention.

    With width D and L layers these are: 6 for each weight of the blocks and each token; 12 D L for each pair of a token
    and one that it attends to, of which a causal row of t tokens has t^2 / 2; and 6 D for each logit. Where the target
    is a code there are as many logits as codes (with `image_softmax` "codes"), otherwise as many as the vocabulary has.
    """
    rows = _rows(config, batch)
    matrices = 3 if config.mlp == "swiglu" else 2
    weights = config.depth * config.width * (4 * config.width + matrices * config.hidden_width)
    pairs = sum(_visible_pairs(row) for row in rows)
    image = int(batch.image_mask.sum())
    text = int((batch.weights > 0).sum()) - image
    vocabulary = config.vocabulary.padded_size
    image_logits = config.num_image_codes if config.image_softmax == "codes" else vocabulary
    return Flops(
        blocks=6 * weights * sum(len(row) for row in rows),
        attention=round(12 * config.width * config.depth * pairs),
        head=6 * config.width * (image * image_logits + text * vocabulary),
    )


def real_tokens(config: TransformerConfig, batch: RowBatch) -> int:
    """The number of tokens of a batch that are not padding."""
    return sum(len(row) for row in _rows(config, batch))


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of dense products, and their origin: "table" for a data sheet, "measured" for a measurement here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name:
                return peak, "table"
    return measured_flops(device, dtype), "measured"


def measured_flops(device: torch.device, dtype: torch.dtype, size: int = 2048, runs: int = 5) -> float:
    """FLOP/s of the fastest of `runs` products of two matrices of `size` x `size`."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(runs + 1):  # the first warms up
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


def _rows(config: TransformerConfig, batch: RowBatch) -> list[Tensor]:
    """The segments [T] of each row, without padding; all 1 in a row that draws."""
    segments = torch.ones_like(batch.tokens) if batch.segments is None else batch.segments
    if batch.lengths is not None:
        return list(segments[0].split(batch.lengths))
    lengths = (batch.tokens != config.vocabulary.command("[PAD]")).sum(dim=1).tolist()
    return [row[:length] for row, length in zip(segments, lengths, strict=True)]


def _visible_pairs(segments: Tensor) -> float:
    """The number of pairs of a token and one that it attends to, in segment 0 and in its own segment."""
    counts = segments.bincount().tolist()
    shared = counts[0]
    return shared**2 / 2 + sum(count * (shared + count / 2) for count in counts[1:])
