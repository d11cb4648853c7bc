"""CogView's published image tokenizer (`vqvae_hard_biggerset_011.pt`): its keys, its picture reader.

Ding et al. 2021 (arXiv:2105.13290), section 2.2. C channels, D code width, N codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.images import CorruptImage
from vqvae.model import VQVAEConfig
from vqvae.storage.parts import ModelError
from vqvae.storage.published import Source, converted, read_checkpoint, shape_of, stream_part

PREFIX = "module."


def tokenizer_sources(config: VQVAEConfig) -> dict[str, Source]:
    """For each tensor of our VQ-VAE the published one. A code is a column of `embed` there, a row of ours."""
    width, codes, channels = config.code_dim, config.codebook_size, config.channels
    down, up = [3, *channels], [width, *reversed(channels)]
    sources = {
        "quantizer.codebook": Source("quantize_t.embed", (width, codes), transpose=True),
        "quantizer.cluster_size": Source("quantize_t.cluster_size", (codes,)),
        "quantizer.cluster_sum": Source("quantize_t.embed_avg", (width, codes), transpose=True),
    }
    for stage in range(len(channels)):
        # a transposed convolution stores [in, out, 4, 4]
        for ours, theirs, out, shape in (
            ("encoder.down", "enc_b", down[stage + 1], (down[stage + 1], down[stage], 4, 4)),
            ("decoder.up", "dec", up[stage + 1], (up[stage], up[stage + 1], 4, 4)),
        ):
            key = f"{theirs}.blocks.{2 * stage}"  # a ReLU stands at every odd place
            sources[f"{ours}.{stage}.weight"] = Source(f"{key}.weight", shape)
            sources[f"{ours}.{stage}.bias"] = Source(f"{key}.bias", (out,))
    last = 2 * len(channels)
    for ours, theirs, out, before in (
        ("encoder.project", "enc_b", width, channels[-1]),
        ("decoder.project", "dec", 3, channels[0]),
    ):
        sources[f"{ours}.weight"] = Source(f"{theirs}.blocks.{last}.weight", (out, before, 1, 1))
        sources[f"{ours}.bias"] = Source(f"{theirs}.blocks.{last}.bias", (out,))
    return sources


def tokenizer_config(found: Mapping[str, Any], path: Path) -> VQVAEConfig:
    """The sizes of a published state dict, read from its codebook and its first convolution. Raises `ModelError`."""
    owner = "CogView image tokenizer"
    width, codes = shape_of(found, "quantize_t.embed", 2, path, owner)
    channels = shape_of(found, "enc_b.blocks.0.weight", 4, path, owner)[0]
    try:
        return VQVAEConfig.cogview(channels=[channels] * 3, code_dim=width, codebook_size=codes)
    except ValueError as error:
        raise ModelError(f"{path} does not fit: {error}") from error


def import_tokenizer(path: Path, folder: Path) -> tuple[VQVAEConfig, str]:
    """Convert the published file to the new part `folder`; returns its config and content hash.

    Raises `ModelError` for a file that is damaged, unsafe, or of another layout.
    """
    found = read_checkpoint(path)
    if found and all(isinstance(key, str) and key.startswith(PREFIX) for key in found):
        found = {key.removeprefix(PREFIX): tensor for key, tensor in found.items()}
    config = tokenizer_config(found, path)
    tensors = converted(found, tokenizer_sources(config), path) | {"quantizer.initialised": torch.tensor(True)}
    return config, stream_part(folder, config, tensors)


def read_picture(path: Path | str, size: int) -> Tensor:
    """A picture [3, size, size] in [0, 1] as CogView's reader makes it, for codes that agree with the original's.

    The shorter side is resized to `size` (bilinear, antialiased), the centre cut out. Transparency is dropped: the
    hidden colours show, where `data.images.open_image` lays them on white. Raises `CorruptImage`.
    """
    from torchvision import transforms

    fit = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()])
    try:
        with Image.open(path) as image:
            return fit(image if image.mode in ("RGB", "RGBA") else image.convert("RGB"))[:3]
    except (OSError, SyntaxError, ValueError) as error:
        raise CorruptImage(f"{path}: a picture that does not decode ({error})") from error
