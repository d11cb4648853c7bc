"""The image tokenizers that there are, behind one interface: `config.stride`, `config.codebook_size`, encode, decode.

A folder of a tokenizer says in its config.json which one it is; without a word it is a `VQVAE`.
"""

from __future__ import annotations

import os
from pathlib import Path

from data.records import parse_json
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.movq import MoVQ, MoVQConfig
from vqvae.storage.parts import load_part
from vqvae.vq16 import VQ16, VQ16Config

ImageTokenizer = VQVAE | VQ16 | MoVQ
TokenizerConfig = VQVAEConfig | VQ16Config | MoVQConfig


def make_tokenizer(config: TokenizerConfig) -> ImageTokenizer:
    """A tokenizer with random weights."""
    if isinstance(config, MoVQConfig):
        return MoVQ(config)
    return VQ16(config) if isinstance(config, VQ16Config) else VQVAE(config)


def load_image_tokenizer(source: str | os.PathLike[str]) -> ImageTokenizer:
    """The tokenizer in a folder, or of a hub id, in eval mode. Raises `ModelError` as `load_part` does."""
    try:
        record = parse_json((Path(source) / "config.json").read_bytes())
    except (OSError, ValueError):
        record = None  # `load_part` says what is wrong, or fetches it
    named = record.get("architecture") if isinstance(record, dict) else None
    if named == "movq":
        return load_part(MoVQ, source)
    return load_part(VQ16, source) if named == "vq16" else load_part(VQVAE, source)


def decoding_bytes(config: TokenizerConfig, grid: tuple[int, int]) -> int:
    """The most bytes that decoding one picture of `grid` codes holds at once, in float32, beside the weights."""
    cells = grid[0] * grid[1]
    if isinstance(config, VQ16Config | MoVQConfig):
        widths, needs = config.widths, list[int]()
        for level, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            # what the level begins with and three tensors of a block; or what is doubled, before and after
            numbers = before + (3 if level == 0 else 9) * width
            if level == 0 and isinstance(config, MoVQConfig):
                # the scaled norms are copies: of what the level begins with, or of what a block is at
                numbers = max(2 * before + 2 * width, before + 4 * width)
            needs.append(cells * (config.stride // 2**level) ** 2 * numbers)
        return 4 * max(needs)
    # the input of a transposed convolution, its output, and that after the ReLU, where the three are largest
    channels = [config.code_dim, *reversed(config.channels)]
    stages = [
        cells * 4**stage * before + 2 * cells * 4 ** (stage + 1) * after
        for stage, (before, after) in enumerate(zip(channels, channels[1:], strict=False))
    ]
    return 4 * max(stages)
