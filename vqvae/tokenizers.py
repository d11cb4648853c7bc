"""The image tokenizers that there are, behind one interface: `config.stride`, `config.codebook_size`, encode, decode.

A folder of a tokenizer says in its config.json which one it is; without a word it is a `VQVAE`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from vqvae.model import VQVAE, VQVAEConfig
from vqvae.storage.parts import load_part
from vqvae.vq16 import VQ16, VQ16Config

ImageTokenizer = VQVAE | VQ16
TokenizerConfig = VQVAEConfig | VQ16Config


def make_tokenizer(config: TokenizerConfig) -> ImageTokenizer:
    """A tokenizer with random weights."""
    return VQ16(config) if isinstance(config, VQ16Config) else VQVAE(config)


def load_image_tokenizer(source: str | os.PathLike[str]) -> ImageTokenizer:
    """The tokenizer in a folder, or of a hub id, in eval mode. Raises `ModelError` as `load_part` does."""
    try:
        record = json.loads((Path(source) / "config.json").read_bytes())
    except (OSError, ValueError):
        record = None  # `load_part` says what is wrong, or fetches it
    named = record.get("architecture") if isinstance(record, dict) else None
    return load_part(VQ16, source) if named == "vq16" else load_part(VQVAE, source)


def decoding_bytes(config: TokenizerConfig, grid: tuple[int, int]) -> int:
    """The most bytes that decoding one picture of `grid` codes holds at once, in float32, beside the weights."""
    cells = grid[0] * grid[1]
    if isinstance(config, VQ16Config):
        widths, needs = config.widths, list[int]()
        for level, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            # what the level begins with and three tensors of a block; or what is doubled, before and after
            numbers = before + (3 if level == 0 else 9) * width
            needs.append(cells * (config.stride // 2**level) ** 2 * numbers)
        return 4 * max(needs)
    # the input of a transposed convolution, its output, and that after the ReLU, where the three are largest
    channels = [config.code_dim, *reversed(config.channels)]
    stages = [
        cells * 4**stage * before + 2 * cells * 4 ** (stage + 1) * after
        for stage, (before, after) in enumerate(zip(channels, channels[1:], strict=False))
    ]
    return 4 * max(stages)
