"""Pictures to codes and back, as files; and folders of shards to shards of codes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from data.atomic import write_files
from data.codes import read_array
from data.shards import MANIFEST_NAME, Manifest, read_manifest
from mmwudao.pictures import encode_png, unused_path
from vqvae.tokenize import TokenizeSettings, tensor_to_image, tokenize_image, tokenize_shards
from vqvae.tokenizers import ImageTokenizer


def tokenize_files(tokenizer: ImageTokenizer, sources: Sequence[Path], out: Path, size: int | None = None) -> list[str]:
    """Write the codes [h, w] of pictures (.npy), and pictures decoded from codes, into the folder `out`, all or none.

    Returns a line to print for each file. Raises `ValueError` that names the source that is no picture or no codes.
    """
    tokenizer = tokenizer.to(device="cpu", dtype=torch.float32)  # codes are looked up in float32, on the CPU
    files: dict[Path, bytes] = {}
    lines = []
    for source in sources:
        if source.suffix == ".npy":
            codes = read_code_file(source)
            image, figures = tensor_to_image(tokenizer.decode(codes[None])[0]), ""
        else:
            try:
                tokenized = tokenize_image(tokenizer, source, size)
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error
            image, figures = tokenized.restored, f"  PSNR {tokenized.psnr:.2f} dB"
            buffer = io.BytesIO()
            numpy.save(buffer, tokenized.codes.to(torch.int32).numpy(), allow_pickle=False)
            path = unused_path(out, source.stem, ".npy", taken=frozenset(files))
            files[path] = buffer.getvalue()
            lines.append(f"{path}  {list(tokenized.codes.shape)} codes")
        path = unused_path(out, f"{source.stem}-decoded", taken=frozenset(files))
        files[path] = encode_png(image)
        lines.append(f"{path}{figures}")
    out.mkdir(parents=True, exist_ok=True)
    write_files(files)
    return lines


def read_code_file(path: Path) -> torch.Tensor:
    """Codes [h, w] int64 of a .npy file. Raises `ValueError` that names the file when it holds anything else."""
    codes = read_array(path.read_bytes(), str(path))
    if codes.ndim != 2 or codes.dtype.kind not in "iu" or not codes.size:
        raise ValueError(f"{path} must hold whole numbers [h, w], not {codes.dtype} {list(codes.shape)}")
    return torch.from_numpy(codes.astype("int64"))


def tokenize_folder(
    tokenizer: ImageTokenizer, shards: Path, out: Path, size: int | None = None, **options: Any
) -> Manifest:
    """`tokenize_shards` with the pictures' own size where `size` is None; `options` are those of `TokenizeSettings`.

    Raises `ValueError` for a folder that holds no shards, and for shards of pictures of many sizes without a `size`.
    """
    if not (shards / MANIFEST_NAME).is_file():
        raise ValueError(f"{shards} is no folder of shards (no {MANIFEST_NAME}): make one with `mmwudao data pack`")
    image_size = size or read_manifest(shards).image_size
    if image_size is None:
        raise ValueError("these shards hold pictures of many sizes: say which with --size")
    return tokenize_shards(tokenizer, shards, out, TokenizeSettings(image_size, **options))
