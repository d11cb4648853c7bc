"""`/v1/images/edits` and `/v1/images/variations` as OpenAI has them: a picture is uploaded, and drawn anew in part."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy
from fastapi import APIRouter, Request, Response
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from mmwudao.canvas import Canvas, extended_canvas, masked_canvas, varied_canvas
from mmwudao.masks import OPAQUE
from mmwudao.service import schemas
from mmwudao.service.answering import ERRORS, Backend, TheBackend
from mmwudao.service.draw_requests import until_gone
from mmwudao.service.errors import BadInput, invalid, refusals
from mmwudao.service.routes_pictures import answer_order, take_order
from mmwudao.tasks import check_describes
from vqvae.storage.parts import ModelError

Body = TypeVar("Body", bound=schemas.GenerationRequest)
Made = TypeVar("Made")

router = APIRouter(responses=ERRORS, tags=["pictures"])
FIELDS = 64  # of a form
EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def _form(body: type[schemas.GenerationRequest], *files: str) -> dict[str, Any]:
    """The description of a form, which the route reads itself: options as fields, and `files`, the first needed."""
    described = body.model_json_schema()
    described["required"] = [files[0], *described.get("required", [])]
    described["properties"] |= {name: {"type": "string", "format": "binary"} for name in files}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": described}}}}


@router.post(
    "/v1/images/edits",
    response_model=schemas.ImagesResponse,
    responses=EVENTS,
    openapi_extra=_form(schemas.EditRequest, "image", "mask"),
)
async def edits(request: Request, backend: TheBackend) -> Response:
    """A picture, in which what the mask erases is drawn anew by a prompt.

    What is transparent in the mask is erased; a mask without transparency erases what is black in it. Without a mask,
    the picture's own transparency is one. All other pixels stay, but for a narrow seam. Streams as generations do.
    """
    body, files = await _read(request, schemas.EditRequest, ("image", "mask"))
    if "mask" in files and body.extend is not None:
        raise BadInput("give a mask or extend, not both", param="extend")
    order = await take_order(body, backend)

    def canvas(pictures: list[Image.Image]) -> Canvas:
        image, form = pictures[0], backend.queues.generator.canvas_format
        if body.extend is not None:
            with refusals("extend"):
                return extended_canvas(form, image, body.extend)
        with refusals("mask"):
            if len(pictures) == 1 and not _erased(image):
                raise BadInput("no mask: send one, or a picture with a transparent part", param="mask")
            return masked_canvas(form, image, pictures[-1])

    order = replace(order, canvas=await _prepare(backend, files, canvas), events="image_edit")
    return await answer_order(body, order, request, backend)


@router.post(
    "/v1/images/variations",
    response_model=schemas.ImagesResponse,
    responses=EVENTS,
    openapi_extra=_form(schemas.VariationRequest, "image"),
)
async def variations(request: Request, backend: TheBackend) -> Response:
    """A picture of which `strength` says how much is drawn anew: squares of it that the seed chooses.

    A generator that was not trained to fill holes draws its lower part anew.
    """
    body, files = await _read(request, schemas.VariationRequest, ("image",))
    backend.queues.check_model(body.model)
    images: list[Image.Image] = await _prepare(backend, files, lambda pictures: pictures)
    if not body.prompt:
        body = body.model_copy(update={"prompt": await _described(backend, images)})
    order = await take_order(body, backend)
    form, seed = backend.queues.generator.canvas_format, order.drawings[0].seed
    canvas = await asyncio.to_thread(varied_canvas, form, images[0], body.strength, seed)
    return await answer_order(body, replace(order, canvas=canvas, events="image_edit"), request, backend)


def _erased(image: Image.Image) -> bool:
    """Whether some of a picture is transparent."""
    return image.mode == "RGBA" and bool((numpy.asarray(image)[..., 3] < OPAQUE).any())


async def _described(backend: Backend, images: list[Image.Image]) -> str:
    """What the model says that a picture shows. Raises `BadInput` for a model that cannot."""
    generator, queues = backend.queues.generator, backend.queues
    try:
        check_describes(generator)
    except ModelError as error:
        raise BadInput("this model cannot describe the picture itself: send a prompt", param="prompt") from error
    gone, on_step = until_gone()
    try:
        (told,) = await queues.run_job(queues.tasks, lambda: generator.caption(images, None, on_step))
    finally:
        gone.set()
    return told


async def _read(request: Request, kind: type[Body], names: tuple[str, ...]) -> tuple[Body, dict[str, bytes]]:
    """The options of a form, and its pictures as they were sent: `image`, and perhaps others of `names`, in that order.

    Raises `BadInput`.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise BadInput("send multipart/form-data, with the picture as the file 'image'")
    backend: Backend = request.app.state.backend
    files: dict[str, bytes] = {}
    options: dict[str, str] = {}
    async with request.form(max_files=4, max_fields=FIELDS, max_part_size=backend.config.max_text) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                name = name.removesuffix("[]")
                if name not in names:
                    raise BadInput(f"files are sent as {' and '.join(names)}", param=name[:64])
                if name in files:
                    raise BadInput("one picture in one request", param=name)
                files[name] = await value.read()
            else:
                options[name] = value
    if "image" not in files:
        raise BadInput("no picture: upload one as the file 'image'", param="image")
    try:
        return kind.model_validate(options), {name: files[name] for name in names if name in files}
    except ValidationError as error:
        raise invalid(error, options) from None


async def _prepare(backend: Backend, files: dict[str, bytes], make: Callable[[list[Image.Image]], Made]) -> Made:
    """`make` of the uploaded pictures, in their order. Raises `ServiceError`s that name them."""
    async with backend.queues.decoded_tasks:
        pictures = await backend.decoder.pictures(list(files.values()), lambda image: image, list(files), alpha=True)
        return await asyncio.to_thread(make, pictures)
