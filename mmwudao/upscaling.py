"""Larger pictures: twice the size by a model's upscaler, or 512 px by CogView's super-resolution."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image

from data.images import to_rgb, to_rgba, to_square, to_tensor
from generation.cogview.sampler import magnify
from mmwudao.loading.loaded import LoadedModel
from mmwudao.loading.model_dir import check_hash
from mmwudao.version import __version__
from vqvae.storage.parts import ModelError, content_hash, load_part
from vqvae.tokenize import tensor_to_image
from vqvae.upscaler import Upscaler

MAX_SIDE = 2048  # px, of a picture that is to be enlarged
COGVIEW_GRID = 32  # codes a side that `magnify` takes

log = logging.getLogger(__name__)


def upscale_pictures(
    model: LoadedModel,
    images: Sequence[Image.Image],
    prompt: str | None,
    seeds: Sequence[int],
    on_step: Callable[[], None] | None = None,
) -> list[Image.Image]:
    """Enlarge pictures; `.info` of each says by which model. An exception that `on_step` raises ends this.

    A model with an upscaler doubles pictures of any shape up to `MAX_SIDE` px a side, transparency too, and reads no
    prompt. An imported
    CogView model draws the centre square at 512 px by sliding windows, the paper's section 3.2: it needs the prompt,
    and draws each with its seed. (Of the published models `cogview-sr` was trained for that; the weights do not tell
    which one they are.)

    Raises `ValueError` for no picture, one that is too large, or a missing prompt; `ModelError` for another model.
    """
    if not images:
        raise ValueError("no picture: give at least one")
    for image in images:
        check_size(image)
    made_by = {"model": model.source, "model_hash": model.config.model_hash, "device": model.device.type}
    if "upscaler" in model.config.parts:
        if prompt is not None:
            log.warning("the upscaler of %s reads no prompt", model.source)
        larger = _double(model, [to_rgba(image) for image in images], on_step)
        made_by["dtype"] = "float32"
    elif model.generator.config.norm == "max_scaled_layernorm":  # set for imported CogView models and nowhere else
        if prompt is None:
            raise ValueError("CogView's super-resolution reads what the picture shows: give a prompt")
        if any(to_rgba(image).mode == "RGBA" for image in images):
            log.warning("transparency is laid on white: this model draws opaque pictures")
        larger = _magnify(model, [to_rgb(image) for image in images], prompt, seeds)
        made_by |= {"prompt": prompt, "dtype": model.dtype}
    else:
        raise ModelError(
            f"{model.source} cannot enlarge pictures: it has no upscaler (`mmwudao train upscaler`, "
            "`mmwudao assemble --upscaler`), and it is no imported CogView model"
        )
    for image in larger:
        image.info.update({**made_by, "version": __version__})
    return larger


def check_sizes(pictures: Mapping[Path, Image.Image]) -> None:
    """`check_size` of pictures from files; the message names the file."""
    for path, picture in pictures.items():
        try:
            check_size(picture)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def check_size(image: Image.Image) -> None:
    """`ValueError` for a picture with more than `MAX_SIDE` pixels a side."""
    if max(image.size) > MAX_SIDE:
        raise ValueError(f"{image.width}x{image.height} pixels: at most {MAX_SIDE} a side can be enlarged")


def _double(model: LoadedModel, pictures: list[Image.Image], on_step: Callable[[], None] | None) -> list[Image.Image]:
    part = model.config.parts["upscaler"]
    upscaler = load_part(Upscaler, model.folder / part.path)
    check_hash(model.folder, "upscaler", content_hash(upscaler), part.hash)
    upscaler.to(device=model.device, dtype=torch.float32)

    def enlarge(picture: Image.Image) -> Image.Image:
        if on_step is not None:
            on_step()
        pixels = to_tensor(to_rgb(picture))[None].to(model.device)
        larger = tensor_to_image(upscaler.enlarge(pixels)[0])
        return larger if picture.mode == "RGB" else _with_alpha(larger, picture.getchannel("A"))

    return [enlarge(picture) for picture in pictures]  # one at a time: their sizes differ


def _with_alpha(larger: Image.Image, alpha: Image.Image) -> Image.Image:
    """A picture that was enlarged on white, with its `alpha` enlarged beside it: on white it looks as it did."""
    mask = alpha.resize(larger.size, Image.Resampling.LANCZOS)
    share = numpy.asarray(mask, numpy.float32)[..., None] / 255
    on_white = numpy.asarray(larger, numpy.float32) / 255
    colours = 1 - (1 - on_white) / numpy.maximum(share, 1 / 255)  # the white that shines through is taken out
    result = Image.fromarray((colours.clip(0, 1) * 255).round().astype(numpy.uint8))
    result.putalpha(mask)
    return result


def _magnify(model: LoadedModel, pictures: list[Image.Image], prompt: str, seeds: Sequence[int]) -> list[Image.Image]:
    vocab, options = model.generator.config.vocabulary, model.config.default_sampling
    text = vocab.text(model.encode_text(prompt))
    head = [vocab.command("[ROI1]"), *text, vocab.command("[BASE]"), vocab.command("[BOI1]")]
    size = COGVIEW_GRID * model.tokenizer.config.stride
    larger = []
    for picture, seed in zip(pictures, seeds, strict=True):
        pixels = to_tensor(to_square(picture, size))[None].to(model.device)
        codes = model.tokenizer.encode(pixels)[0].cpu()
        drawn = magnify(model.generator, head, codes, options, generator=torch.Generator().manual_seed(seed))
        larger.append(tensor_to_image(model.tokenizer.decode(drawn[None].to(model.device))[0]))
        larger[-1].info["seed"] = seed
    return larger
