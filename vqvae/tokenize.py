"""Pictures to codes and back, one by one or whole shards."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.atomic import check_unused, new_folder
from data.batches import Batch, encode_shards
from data.codes import CodedSample
from data.images import open_image, to_batch, to_square, to_tensor
from data.reading import Skip, SkipLog, expand_shards
from data.sample import DataError
from data.shards import Manifest, ShardWriter, read_manifest, write_manifest
from vqvae.model import VQVAE
from vqvae.psnr import psnr
from vqvae.storage.parts import content_hash


@dataclass
class TokenizedImage:
    """Codes [h, w] of one picture, its reconstruction, and the PSNR between them in dB."""

    codes: Tensor
    restored: Image.Image
    psnr: float


def tokenize_image(model: VQVAE, path: Path, image_size: int | None = None) -> TokenizedImage:
    """Encode and decode one picture: `image_size` px square, or its own size cut down to a multiple of the stride.

    Raises `DataError` for a file that is no readable picture.
    """
    image = open_image(path)
    if image_size is not None:
        image = to_square(image, image_size)
    else:
        stride = model.config.stride
        width, height = image.width // stride * stride, image.height // stride * stride
        if not width or not height:
            raise DataError(f"{path} is {image.width}x{image.height} pixels; at least {stride}x{stride} are needed")
        image = image.crop((0, 0, width, height))
    pixels = to_tensor(image).unsqueeze(0)
    codes = model.encode(pixels)
    restored = model.decode(codes)
    return TokenizedImage(codes[0], tensor_to_image(restored[0]), float(psnr(restored, pixels)[0]))


def tensor_to_image(pixels: Tensor) -> Image.Image:
    """A PIL picture of `pixels` [3, H, W] in [0, 1]."""
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


@dataclass(frozen=True)
class TokenizeSettings:
    """How shards are encoded: pictures of `image_size` px square, `batch_size` at a time.

    `workers` threads each decode and encode a batch; None: one a core. With `draft`, large JPEGs are decoded at a
    fraction of their size, at least twice `image_size`, and pixels come out a few grey levels off. `strict` stops at
    the first unreadable picture. `progress` shows a bar.
    """

    image_size: int
    batch_size: int = 64
    samples_per_shard: int = 10_000
    workers: int | None = None
    device: str = "cpu"
    progress: bool = True
    strict: bool = False
    draft: bool = False


def tokenize_shards(model: VQVAE, shards: Path, out: Path, settings: TokenizeSettings) -> Manifest:
    """Write shards of codes for every split of the folder `shards` into the new folder `out`.

    The manifest names the tokenizer by content hash, and says whether pictures were decoded as drafts. Unreadable
    pictures are skipped, counted in the manifest and named in the log. Raises `DataError` for a folder without a
    manifest or an output that is there already, and at the first unreadable picture if `settings.strict`.
    """
    from tqdm import tqdm

    shards, out = Path(shards), Path(out)
    check_unused(out)
    source = read_manifest(shards)
    sources = source.sources | {"tokenizer": content_hash(model)}
    if settings.draft:
        sources["decoding"] = "draft"
    # the nearest code is searched in float32, whatever the weights are stored in
    model = model.to(device=settings.device, dtype=torch.float32)
    with new_folder(out) as building:
        log = SkipLog(building / "skipped.log")
        splits = {}
        for split in source.splits:
            if not source.splits[split]:
                continue
            bar = tqdm(total=source.samples(split), desc=split, disable=not settings.progress)
            batches = _encoded(model, expand_shards(shards, split), settings)
            with ShardWriter(building, split, settings.samples_per_shard) as writer, bar, closing(batches):
                for entry in (entry for batch in batches for entry in batch.entries):
                    if isinstance(entry, Skip):
                        log.take(entry, settings.strict)
                        continue
                    sample, codes = entry
                    writer.write_members(sample.id, CodedSample(sample, codes).to_members())
                    bar.update()
            splits[split] = writer.shards
        manifest = Manifest(source.name, settings.image_size, splits, sources, dict(log.counts))
        write_manifest(building, manifest)
    return manifest


def _encoded(
    model: VQVAE, shards: Iterable[Path], settings: TokenizeSettings
) -> Generator[Batch[NDArray[numpy.integer]]]:
    """The samples of shards with their codes [h, w], in order, batch by batch."""
    dtype = numpy.uint16 if model.config.codebook_size <= 65536 else numpy.int32

    def prepare(image: Image.Image) -> NDArray[numpy.uint8]:
        return numpy.asarray(to_square(image, settings.image_size))

    def encode(pictures: list[NDArray[numpy.uint8]]) -> NDArray[numpy.integer]:
        return model.encode(to_batch(pictures, settings.device)).cpu().numpy().astype(dtype)

    return encode_shards(
        shards,
        prepare,
        encode,
        batch_size=settings.batch_size,
        workers=settings.workers,
        device=settings.device,
        least_side=2 * settings.image_size if settings.draft else None,
    )
