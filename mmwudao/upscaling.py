"""Larger pictures: twice the size by a model's upscaler, or 512 px by CogView's super-resolution."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from data.images import to_square, to_tensor
from generation.cogview_sampling import magnify
from mmwudao import __version__
from mmwudao.model_dir import check_hash
from vqvae.hub import ModelError, content_hash, load_part
from vqvae.tokenize import tensor_to_image
from vqvae.upscaler import Upscaler

if TYPE_CHECKING:
    from mmwudao.pipeline import Pipeline

MAX_SIDE = 2048  # px, of a picture that is to be enlarged
COGVIEW_GRID = 32  # codes a side that `magnify` takes

log = logging.getLogger(__name__)


def upscale(
    pipeline: Pipeline, images: Sequence[Image.Image], prompt: str | None, seeds: Sequence[int]
) -> list[Image.Image]:
    """Enlarge pictures; `.info` of each says by which model.

    A model with an upscaler doubles pictures of any shape up to `MAX_SIDE` px a side, and reads no prompt. An imported
    CogView model draws the centre square at 512 px by sliding windows, the paper's section 3.2: it needs the prompt,
    and draws each with its seed. (Of the published models `cogview-sr` was trained for that; the weights do not tell
    which one they are.)

    Raises `ValueError` for no picture, one that is too large, or a missing prompt; `ModelError` for another model.
    """
    if not images:
        raise ValueError("no picture: give at least one")
    for image in images:
        check_size(image)
    pictures = [image.convert("RGB") for image in images]
    made_by = {"model": pipeline.source, "model_hash": pipeline.config.model_hash, "device": pipeline.device.type}
    if "upscaler" in pipeline.config.parts:
        if prompt is not None:
            log.warning("the upscaler of %s reads no prompt", pipeline.source)
        larger = _double(pipeline, pictures)
        made_by["dtype"] = "float32"
    elif pipeline.generator.config.norm == "max_scaled_layernorm":  # set for imported CogView models and nowhere else
        if prompt is None:
            raise ValueError("CogView's super-resolution reads what the picture shows: give a prompt")
        larger = _magnify(pipeline, pictures, prompt, seeds)
        made_by |= {"prompt": prompt, "dtype": pipeline.dtype}
    else:
        raise ModelError(
            f"{pipeline.source} cannot enlarge pictures: it has no upscaler (`mmwudao train upscaler`, "
            "`mmwudao assemble --upscaler`), and it is no imported CogView model"
        )
    for image in larger:
        image.info.update({**made_by, "version": __version__})
    return larger


def check_size(image: Image.Image) -> None:
    """`ValueError` for a picture with more than `MAX_SIDE` pixels a side."""
    if max(image.size) > MAX_SIDE:
        raise ValueError(f"{image.width}x{image.height} pixels: at most {MAX_SIDE} a side can be enlarged")


def _double(pipeline: Pipeline, pictures: list[Image.Image]) -> list[Image.Image]:
    part = pipeline.config.parts["upscaler"]
    upscaler = load_part(Upscaler, pipeline.folder / part.path)
    check_hash(pipeline.folder, "upscaler", content_hash(upscaler), part.hash)
    upscaler.to(device=pipeline.device, dtype=torch.float32)
    # one at a time: their sizes differ
    return [tensor_to_image(upscaler.enlarge(to_tensor(picture)[None].to(pipeline.device))[0]) for picture in pictures]


def _magnify(
    pipeline: Pipeline, pictures: list[Image.Image], prompt: str, seeds: Sequence[int]
) -> list[Image.Image]:
    vocab, options = pipeline.generator.config.vocabulary, pipeline.config.default_sampling
    text = vocab.text(pipeline._encode(prompt))
    head = [vocab.command("[ROI1]"), *text, vocab.command("[BASE]"), vocab.command("[BOI1]")]
    size = COGVIEW_GRID * pipeline.tokenizer.config.stride
    larger = []
    for picture, seed in zip(pictures, seeds, strict=True):
        pixels = to_tensor(to_square(picture, size))[None].to(pipeline.device)
        codes = pipeline.tokenizer.encode(pixels)[0].cpu()
        drawn = magnify(pipeline.generator, head, codes, options, generator=torch.Generator().manual_seed(seed))
        larger.append(tensor_to_image(pipeline.tokenizer.decode(drawn[None].to(pipeline.device))[0]))
        larger[-1].info["seed"] = seed
    return larger
