"""How much memory drawing takes, computed before anything is allocated, and how much a device has left.

Pictures are drawn in blocks of a fixed number of rows (`generation.drawing.blocks`), one block after the other, so
memory does not grow with the number of pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from data.host_memory import free_host_bytes
from generation.drawing.blocks import cache_shape, full_block
from generation.drawing.fused_step import fused_numbers
from generation.drawing.noise import KEPT
from generation.drawing.sampling import SamplingOptions
from generation.drawing.window_cache import branches_of
from generation.rows.row import COMMANDS_IN_ROW
from generation.transformer.config import TransformerConfig
from generation.transformer.expert_memory import all_expert_bytes
from generation.transformer.model import Transformer
from vqvae.storage.parts import without_weights
from vqvae.tokenizers import TokenizerConfig, decoding_bytes, make_tokenizer

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
    encoder: int = 0  # of prompts, beside the transformer

    @property
    def working(self) -> int:
        """Bytes on top of the weights."""
        return max(self.cache + self.matrices + self.noise + self.activations, self.picture)

    @property
    def total(self) -> int:
        return self.transformer + self.tokenizer + self.encoder + self.working


def plan_drawing(
    config: TransformerConfig,
    tokenizer: TokenizerConfig,
    dtype: torch.dtype,
    device: str,
    grid: tuple[int, int] | None = None,
    given: int = 0,
    options: SamplingOptions | None = None,
    eight_bits: bool = False,
    encoder: int = 0,
    expert_memory: int | None = None,
) -> DrawingMemory:
    """The memory of drawing pictures of `grid` codes, `given` of them known, on a device type such as "cuda".

    `eight_bits`: the matrices of the blocks have 8 bits (`generation.transformer.int8`). `encoder` is what an encoder
    of prompts takes. `expert_memory`: bytes of experts that are in memory, where the others stay in the file
    (`generation.transformer.expert_memory`).
    """
    grid, options = grid or config.grid, options or SamplingOptions()
    steps, window = config.places(grid), min(options.window, config.places(grid))
    rows = full_block(config, grid)
    size = dtype.itemsize
    gates = 3 if config.mlp == "swiglu" else 2
    outputs = (2 * config.heads + 2 * config.key_heads) * config.head_width + gates * config.hidden_width
    eight = config.depth * outputs * config.width if eight_bits else 0
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
    depth, _, slots, width = cache_shape(config, rows, grid)
    left_out = 0 if expert_memory is None else max(0, all_expert_bytes(config, dtype) - expert_memory)
    return DrawingMemory(
        transformer=_weight_bytes(lambda: Transformer(config), size) - (size - 1) * eight - left_out,
        tokenizer=_weight_bytes(lambda: make_tokenizer(tokenizer), 4),
        rows=rows,
        cache=2 * depth * rows * (slots + branches_of(window)) * width * (4 if device == "cpu" else size),  # as drawing
        matrices=4 * fused_numbers(config, eight_bits) if alone else 0,
        noise=rows // (1 if options.guidance == 1 else 2) * _noise_bytes(config, grid, window),
        activations=max(needs),
        picture=decoding_bytes(tokenizer, grid),
        encoder=encoder,
    )


def _noise_bytes(config: TransformerConfig, grid: tuple[int, int], window: int) -> int:
    """Bytes of the noise of a picture, by `generation.drawing.noise`."""
    if config.noise == "table":
        return grid[0] * grid[1] * config.num_image_codes * 4
    # those kept, those of a pass, and one place in float64, of bits, numbers and logarithms
    return config.num_image_codes * (4 * (min(KEPT, grid[0] * grid[1]) + window) + 24)


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


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_host_bytes() if device.type == "cpu" else None


def check_memory(
    needed: int, device: torch.device, dtype: torch.dtype, others: Callable[[], dict[str, int]] | None = None
) -> None:
    """`NotEnoughMemory`, which says what to change, if a device has fewer than `needed` bytes left.

    `others` tells what drawing takes in smaller number formats, by name, so that those that fit are named.
    """
    available = available_bytes(device)
    if available is None or needed <= available:
        return
    choices = ["a smaller model", "--device cpu" if device.type == "cuda" else "a machine with more memory"]
    if others is not None:
        fitting = {name: size for name, size in others().items() if size <= available}
        choices = [f"--dtype {name} ({size / 1e9:.2f} GB)" for name, size in fitting.items()] + choices
    elif dtype == torch.float32:
        choices.insert(0, "--dtype bfloat16")
    raise NotEnoughMemory(
        f"drawing with this model takes {needed / 1e9:.2f} GB more on {device.type}, where {available / 1e9:.2f} GB "
        f"are free: use {', '.join(choices[:-1])} or {choices[-1]}"
    )
