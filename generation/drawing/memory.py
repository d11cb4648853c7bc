"""How much memory drawing takes, computed before anything is allocated, and how much a device has left.

Pictures are drawn in blocks of a fixed number of rows (`generation.drawing.blocks`), one block after the other, so
memory does not grow with the number of pictures.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from generation.drawing.blocks import cache_shape, full_block
from generation.drawing.fused_step import fused_numbers
from generation.drawing.sampling import SamplingOptions
from generation.rows.row import COMMANDS_IN_ROW
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.storage.parts import without_weights

SAMPLING = 32  # bytes a logit: copies in float32, a sort and its indices


class NotEnoughMemory(ValueError):
    """The device has too little memory left for what is asked of it."""


@dataclass(frozen=True)
class DrawingMemory:
    """Bytes that drawing takes, by what they hold."""

    transformer: int
    tokenizer: int
    rows: int  # of a block
    cache: int
    matrices: int  # copied for a faster step (`generation.drawing.fused_step`)
    noise: int  # of all places of the pictures in a block
    activations: int  # the most that a prefill or a step needs beside the above
    picture: int  # decoding one picture, after the cache is freed

    @property
    def working(self) -> int:
        """Bytes on top of the weights."""
        return max(self.cache + self.matrices + self.noise + self.activations, self.picture)

    @property
    def total(self) -> int:
        return self.transformer + self.tokenizer + self.working


def plan_drawing(
    config: TransformerConfig,
    tokenizer: VQVAEConfig,
    dtype: torch.dtype,
    device: str,
    grid: tuple[int, int] | None = None,
    given: int = 0,
    options: SamplingOptions | None = None,
) -> DrawingMemory:
    """The memory of drawing pictures of `grid` codes, `given` of them known, on a device type such as "cuda"."""
    grid, options = grid or config.grid, options or SamplingOptions()
    steps, window = grid[0] * grid[1], min(options.window, grid[0] * grid[1])
    rows = full_block(config, grid)
    size = dtype.itemsize
    prompt = config.max_text + COMMANDS_IN_ROW - 1
    alone = device == "cpu" and window == 1  # every row is prefilled by itself
    needs = [
        _layer_bytes(config, 1 if alone else rows, prompt + given, prompt + given, size),
        _layer_bytes(config, rows, window, prompt + steps - 1, size),
        rows * window * config.num_image_codes * SAMPLING,
    ]
    if device == "cpu":
        trial = _trial_bytes(config, rows, 1 if alone else prompt + window)
        needs += [trial + _layer_bytes(config, 1 if alone else rows, prompt, prompt, size), 2 * trial]
    return DrawingMemory(
        transformer=_weight_bytes(lambda: Transformer(config), size),
        tokenizer=_weight_bytes(lambda: VQVAE(tokenizer), 4),
        rows=rows,
        cache=2 * math.prod(cache_shape(config, rows, grid)) * (4 if device == "cpu" else size),  # as decoding does
        matrices=4 * fused_numbers(config) if alone else 0,
        noise=rows // (1 if options.guidance == 1 else 2) * steps * config.num_image_codes * 4,
        activations=max(needs),
        picture=_picture_bytes(tokenizer, grid),
    )


def _weight_bytes(build: Callable[[], nn.Module], size: int) -> int:
    with without_weights():
        module = build()
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers())) * size


def _layer_bytes(config: TransformerConfig, rows: int, queries: int, keys: int, size: int) -> int:
    """The most bytes alive in a layer: in the MLP, or in attention with its scores."""
    width, hidden = config.width, config.hidden_width
    # the layer's input, that of the MLP before and after its norm, the attention's output; then the hidden copies
    mlp = 4 * width + 4 * hidden if config.mlp == "swiglu" else 5 * width + 2 * hidden
    # one query on a CPU does not use the fused kernel, and neither does relaxation anywhere
    unfused = config.pb_relax > 0 or queries == 1
    attention = 8 * width + (3 * config.heads * keys if unfused else 0)
    return rows * queries * (max(mlp, attention) * size + 4 * keys)  # 4: the mask


def _trial_bytes(config: TransformerConfig, rows: int, length: int) -> int:
    """Bytes that the trial of small blocks (`blocks.block_rows`) compares: the outputs of all linear layers."""
    gates = 2 if config.mlp == "swiglu" else 1
    outputs = 5 * config.width + gates * config.hidden_width + config.num_image_codes
    return rows * length * outputs * 4


def _picture_bytes(config: VQVAEConfig, grid: tuple[int, int]) -> int:
    """The input of a transposed convolution, its output, and that after the ReLU, where the three are largest."""
    channels = [config.code_dim, *reversed(config.channels)]
    cells = grid[0] * grid[1]
    stages = [
        cells * 4**stage * before + 2 * cells * 4 ** (stage + 1) * after
        for stage, (before, after) in enumerate(zip(channels, channels[1:], strict=False))
    ]
    return 4 * max(stages)


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = []
    with suppress(OSError, ValueError, IndexError):  # Linux
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    if not found:
        with suppress(OSError, ValueError, AttributeError):  # other Unix systems
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError, KeyError):  # no control groups here, or no limit ("max")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        usage = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(usage["file"]))  # the page cache can be freed
    return min(found, default=None)


def check_memory(needed: int, device: torch.device, dtype: torch.dtype) -> None:
    """`NotEnoughMemory`, which says what to change, if a device has fewer than `needed` bytes left."""
    available = available_bytes(device)
    if available is None or needed <= available:
        return
    choices = ["a smaller model", "--device cpu" if device.type == "cuda" else "a machine with more memory"]
    if dtype == torch.float32:
        choices.insert(0, "--dtype bfloat16")
    raise NotEnoughMemory(
        f"drawing with this model takes {needed / 1e9:.2f} GB more on {device.type}, where {available / 1e9:.2f} GB "
        f"are free: use {', '.join(choices[:-1])} or {choices[-1]}"
    )
