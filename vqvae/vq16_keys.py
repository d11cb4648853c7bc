"""VQ-16 as published: the keys of Janus' and LlamaGen's own code, and those of transformers.

L levels, B residual blocks of a level, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from vqvae.storage.parts import ModelError, without_weights
from vqvae.storage.published import Source, shape_of
from vqvae.vq16 import VQ16, VQ16Config

KeyLayout = Literal["original", "transformers"]

# ours -> theirs, by the parts of a name; what is not here is called the same
_PARTS: dict[str, str] = {"first": "conv_in", "norm": "norm_out", "last": "conv_out"}
_LEVEL = re.compile(r"(encoder|decoder)\.levels\.(\d+)\.(.*)")
_MIDDLE = re.compile(r"(encoder|decoder)\.middle\.(\d)\.(.*)")
_OUTER = {"to_code": "quant_conv", "from_code": "post_quant_conv", "codebook": "quantize.embedding"}


def vq16_key(name: str, layout: KeyLayout) -> str:
    """The published key, without its prefix, of one of our tensors."""
    if match := _LEVEL.fullmatch(name):
        side, level, rest = match.groups()
        return f"{side}.{_levels_of(side, layout)}.{level}.{_in_level(rest, side, layout)}"
    if match := _MIDDLE.fullmatch(name):
        side, place, rest = match.groups()
        middle = place if layout == "original" else ("block_1", "attn_1", "block_2")[int(place)]
        return f"{side}.mid.{middle}.{_in_block(rest)}"
    start, _, rest = name.partition(".")
    if start in _OUTER:
        return f"{_OUTER[start]}.{rest}"
    part, _, kind = rest.rpartition(".")
    return f"{start}.{_PARTS[part]}.{kind}"


def _levels_of(side: str, layout: KeyLayout) -> str:
    if layout == "original":
        return "conv_blocks"
    return "down" if side == "encoder" else "up"


def _in_level(rest: str, side: str, layout: KeyLayout) -> str:
    kind, _, rest = rest.partition(".")
    if kind == "resize":
        return f"{'downsample' if side == 'encoder' else 'upsample'}.{rest}"
    names = {"blocks": "res" if layout == "original" else "block", "attention": "attn"}
    place, _, rest = rest.partition(".")
    return f"{names[kind]}.{place}.{_in_block(rest)}"


def _in_block(rest: str) -> str:
    part, _, kind = rest.rpartition(".")
    return f"{ {'shortcut': 'nin_shortcut', 'project': 'proj_out'}.get(part, part) }.{kind}"


def vq16_sources(config: VQ16Config, prefix: str, layout: KeyLayout) -> dict[str, Source]:
    """For each tensor of our `VQ16` the published one."""
    with without_weights():
        module: nn.Module = VQ16(config)
    return {
        name: Source(prefix + vq16_key(name, layout), tuple(tensor.shape))
        for name, tensor in module.state_dict().items()
    }


def vq16_config(found: Mapping[str, Any], prefix: str, layout: KeyLayout, path: Path) -> VQ16Config:
    """The sizes that published tensors have. Raises `ModelError` for other tensors."""
    start = f"{prefix}encoder.{_levels_of('encoder', layout)}."
    block = "res" if layout == "original" else "block"
    first = re.compile(re.escape(start) + rf"(\d{{1,2}})\.{block}\.(\d{{1,2}})\.conv1\.weight")
    places = [match.groups() for key in found if isinstance(key, str) and (match := first.fullmatch(key))]
    levels, blocks = sorted({int(level) for level, _ in places}), {int(number) for _, number in places}
    owner = "VQ-16 tokenizer"
    channels = shape_of(found, f"{prefix}encoder.conv_in.weight", 4, path, owner)[0]
    widths = [shape_of(found, f"{start}{level}.{block}.0.conv1.weight", 4, path, owner)[0] for level in levels]
    if levels != [*range(len(levels))] or not levels or any(width % channels for width in widths):
        raise ModelError(f"{path} holds no {owner}: its levels are {levels}, {widths} wide over {channels}")
    latent = shape_of(found, f"{prefix}encoder.conv_out.weight", 4, path, owner)[0]
    codes, width = shape_of(found, f"{prefix}quantize.embedding.weight", 2, path, owner)
    try:
        return VQ16Config(
            channels=channels,
            multipliers=[width // channels for width in widths],
            residual_blocks=len(blocks),
            latent=latent,
            code_dim=width,
            codebook_size=codes,
        )
    except ValueError as error:
        raise ModelError(f"{path} does not fit: {error}") from error
