"""`/v1/embeddings` as OpenAI has it, for texts and pictures."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from mmwudao.service import schemas
from mmwudao.service.answering import ANYTHING, ERRORS, Backend, answer_in_time, backend_of, json_response
from mmwudao.service.errors import BadInput, invalid
from mmwudao.service.inputs import Source, split_input
from mmwudao.service.queues import Embedded

router = APIRouter(responses=ERRORS, tags=["vectors"])


def _request_body() -> dict[str, Any]:
    """The description of the body, which the route reads itself: FastAPI reads one content type per route."""
    as_json = schemas.EmbeddingRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    as_json.pop("$defs")  # they are among the components, see `add_parts`
    files = {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
    formats = as_json["properties"]["encoding_format"]
    upload = {
        "type": "object",
        "required": ["file"],
        "properties": {"file": files, "encoding_format": formats, "model": {"type": "string"}},
    }
    content = {"application/json": {"schema": as_json}, "multipart/form-data": {"schema": upload}}
    return {"requestBody": {"required": True, "content": content}}


def add_parts(openapi: dict[str, Any]) -> None:
    """Add the schemas that `_request_body` refers to, to the components of a description."""
    defs = schemas.EmbeddingRequest.model_json_schema(ref_template="#/components/schemas/{model}")["$defs"]
    openapi["components"]["schemas"].update(defs)


@router.post("/v1/embeddings", response_model=schemas.EmbeddingList, openapi_extra=_request_body())
async def embeddings(request: Request) -> Response:
    """Vectors of unit length of texts and pictures: one space, so a text and what shows it are near each other.

    Pictures are sent as data URIs in JSON, or uploaded as `file` (once or more) in multipart/form-data.
    """
    # not a dependency: clients call this route most, and FastAPI's dependencies take a tenth of its time
    backend = await backend_of(request)
    sources: Sequence[Source]
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data":
        body, sources = await _uploaded(request, backend)
        params = ["file"] * len(sources)
    else:
        body = await _json_body(request, backend)
        sources = split_input(body.input)
        params = [f"input[{k}]" for k in range(len(sources))] if isinstance(body.input, list) else ["input"]
    backend.queues.check_model(body.model)
    backend.decoder.check_count(len(sources), backend.config.max_inputs, "input")
    dim = backend.queues.towers.embed_dim
    if body.dimensions not in (None, dim):
        raise BadInput(f"this model's vectors have {dim} dimensions", param="dimensions")
    found = await answer_in_time(request, embed(backend, sources, params), backend.config.deadline)
    return json_response(_response(found, body.encoding_format, backend.served.name))


async def embed(backend: Backend, sources: Sequence[Source], params: Sequence[str]) -> list[Embedded]:
    """The vector of each text, picture, or uploaded picture (bytes); `params` are their names in the request.

    Raises `ServiceError`s with these names.
    """
    queues, towers = backend.queues, backend.queues.towers
    words: list[str] = []
    pictures: list[str | bytes] = []
    named: list[str] = []  # of the pictures
    for source, param in zip(sources, params, strict=True):
        if isinstance(source, schemas.TextPart):
            words.append(backend.decoder.text(source.text, param))
            backend.log_prompt(param, source.text)
        else:
            pictures.append(source.image if isinstance(source, schemas.ImagePart) else source)
            named.append(param)
    # room in both queues or in none: a request that is refused by one must not fill the other
    async with queues.texts.reserve(len(words)), queues.images.reserve(len(pictures)):
        if not pictures:
            return await queues.texts.submit(words)
        pixels = await backend.decoder.pictures(pictures, towers.preprocess, named)
        if not words:
            return await queues.images.submit(pixels)
        both = await asyncio.gather(queues.texts.submit(words), queues.images.submit(pixels))
    of_texts, of_images = map(iter, both)
    return [next(of_texts if isinstance(source, schemas.TextPart) else of_images) for source in sources]


async def _json_body(request: Request, backend: Backend) -> schemas.EmbeddingRequest:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise BadInput("send application/json, or pictures as multipart/form-data")
    content = await request.body()
    if backend.queues.texts.full and not _may_hold_picture(content):
        backend.queues.texts.check_room()  # a full queue is said before the body is parsed, which takes longer
    try:
        return schemas.EmbeddingRequest.model_validate_json(content)
    except ValidationError as error:
        raise _told(error, content) from None


def _may_hold_picture(content: bytes) -> bool:
    """Whether a body may hold a picture: a data URI, a URL, or what escapes spell."""
    small = content.lower()
    return any(sign in small for sign in (b"image", b"http", b"\\"))


def _told(error: ValidationError, content: bytes) -> BadInput:
    """What is wrong with a body."""
    if error.errors()[0]["type"] == "json_invalid":
        return invalid(error)
    sent = ANYTHING.validate_json(content)
    given = sent.get("input") if isinstance(sent, dict) else None
    first = given[0] if isinstance(given, list) and given else None
    if isinstance(first, int | list):  # some clients, LangChain among them, count tokens before they ask
        return BadInput("input: tokens mean nothing to another model's towers: send texts", param="input")
    return invalid(error, sent)


async def _uploaded(request: Request, backend: Backend) -> tuple[schemas.EmbeddingRequest, Sequence[Source]]:
    """The options and the pictures of a form. Clients' names of files are ignored."""
    config = backend.config
    async with request.form(max_files=config.max_inputs, max_fields=8, max_part_size=config.max_text) as form:
        files: list[bytes] = []
        options: dict[str, str] = {}
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in ("file", "file[]"):
                    raise BadInput("pictures are uploaded in the field 'file'")
                files.append(await value.read())
            else:
                options[name] = value
    if not files:
        raise BadInput("no picture: upload at least one in the field 'file'")
    if "input" in options:
        raise BadInput("texts are sent in JSON, pictures in the field 'file'")
    try:
        return schemas.EmbeddingRequest.model_validate({**options, "input": "-"}), files
    except ValidationError as error:
        raise invalid(error, options) from None


def _response(found: list[Embedded], encoding: str, model: str) -> dict[str, Any]:
    """An `EmbeddingList` as a plain dictionary: building pydantic models of it takes longer than writing it."""
    tokens = sum(one.tokens for one in found)
    data = []
    for index, (vector, _) in enumerate(found):
        numbers = vector.tolist() if encoding == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": numbers})
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
