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
from data.augment import draw_view, view_square
from data.batches import Batch, encode_shards
from data.codes import CodedSample
from data.images import open_image, to_batch, to_square, to_tensor
from data.options import SIDE
from data.reading import Skip, SkipLog, expand_shards
from data.sample import DataError, Sample
from data.settings import LEAST_SIDE, TokenizeSettings
from data.shards import Manifest, ShardWriter, read_manifest, write_manifest
from vqvae.psnr import psnr
from vqvae.storage.parts import content_hash
from vqvae.tokenizers import ImageTokenizer


@dataclass
class TokenizedImage:
    """Codes [h, w] of one picture, its reconstruction, and the PSNR between them in dB."""

    codes: Tensor
    restored: Image.Image
    psnr: float


def tokenize_image(model: ImageTokenizer, path: Path, image_size: int | None = None) -> TokenizedImage:
    """Encode and decode one picture: `image_size` px square, or its own size cut down to a multiple of the stride.

    Raises `DataError` for a file that is no readable picture, and a size that is out of range or no multiple of the
    stride.
    """
    if image_size is not None:
        check_crop(model, image_size)
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


def check_crop(model: ImageTokenizer, image_size: int) -> None:
    """Raises `DataError` for a size that pictures cannot be cropped to for this tokenizer."""
    stride = model.config.stride
    if not LEAST_SIDE <= image_size <= SIDE or image_size % stride:
        raise DataError(
            f"pictures are cropped to {LEAST_SIDE} to {SIDE} pixels, a multiple of {stride}: not {image_size}"
        )


def tensor_to_image(pixels: Tensor) -> Image.Image:
    """A PIL picture of `pixels` [3, H, W] in [0, 1]."""
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def tokenize_shards(model: ImageTokenizer, shards: Path, out: Path, settings: TokenizeSettings) -> Manifest:
    """Write shards of codes for every split of the folder `shards` into the new folder `out`.

    The manifest names the tokenizer by content hash, and says whether pictures were decoded as drafts and how many
    other views there are. Unreadable pictures are skipped, counted in the manifest and named in the log. Raises
    `DataError` for a folder without a manifest, an output that is there already, or views of a split that is not there,
    and at the first unreadable picture if `settings.strict`.
    """
    from tqdm import tqdm

    shards, out = Path(shards), Path(out)
    check_unused(out)
    check_crop(model, settings.image_size)
    source = read_manifest(shards)
    sources = source.sources | {"tokenizer": content_hash(model)}
    if settings.draft:
        sources["decoding"] = "draft"
    if settings.augment:
        if settings.augment < 0 or not source.splits.get(settings.augment_split):
            raise DataError(f"{settings.augment} other views of the split {settings.augment_split!r}: there is none")
        sources["views"] = f"{settings.augment} of {settings.augment_split}"
    # the nearest code is searched in float32, whatever the weights are stored in
    model = model.to(device=settings.device, dtype=torch.float32)
    with new_folder(out) as building:
        log = SkipLog(building / "skipped.log")
        splits = {}
        for split in source.splits:
            if not source.splits[split]:
                continue
            bar = tqdm(total=source.samples(split), desc=split, disable=not settings.progress)
            views = settings.augment if split == settings.augment_split else 0
            batches = _encoded(model, expand_shards(shards, split), settings, views)
            with ShardWriter(building, split, settings.samples_per_shard) as writer, bar, closing(batches):
                for entry in (entry for batch in batches for entry in batch.entries):
                    if isinstance(entry, Skip):
                        log.take(entry, settings.strict)
                        continue
                    sample, codes = entry
                    coded = CodedSample(sample, codes[0], codes[1:] if views else None)
                    writer.write_members(sample.id, coded.to_members())
                    bar.update()
            splits[split] = writer.shards
        if not any(splits.values()):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in log.counts.items()) or "no sample"
            raise DataError(f"nothing to tokenize in {shards} ({reasons})")
        manifest = Manifest(source.name, settings.image_size, splits, sources, dict(log.counts))
        write_manifest(building, manifest)
    return manifest


def _encoded(
    model: ImageTokenizer, shards: Iterable[Path], settings: TokenizeSettings, views: int
) -> Generator[Batch[NDArray[numpy.integer]]]:
    """The samples of shards with codes [1 + views, h, w], the picture's own first, in order, batch by batch."""
    dtype = numpy.uint16 if model.config.codebook_size <= 65536 else numpy.int32

    def prepare(image: Image.Image, sample: Sample) -> NDArray[numpy.uint8]:
        squares = [to_square(image, settings.image_size)]
        squares += [view_square(image, settings.image_size, draw_view(sample, number)) for number in range(views)]
        return numpy.stack([numpy.asarray(square) for square in squares])

    def encode(pictures: list[NDArray[numpy.uint8]]) -> NDArray[numpy.integer]:
        # one view of all pictures at a time: the first batches are those of a run without other views
        batches = (to_batch(list(same), settings.device) for same in zip(*pictures, strict=True))
        codes = [model.encode(batch).cpu().numpy().astype(dtype) for batch in batches]
        return numpy.stack(codes, axis=1)

    return encode_shards(
        shards,
        prepare,
        encode,
        batch_size=settings.batch_size,
        workers=settings.workers,
        device=settings.device,
        least_side=2 * settings.image_size if settings.draft else None,
        captions="or questions",
    )
