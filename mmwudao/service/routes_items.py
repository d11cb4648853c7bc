"""Search, and the items that are searched: `/v1/search` and `/v1/items`."""

from __future__ import annotations

from typing import Annotated

import numpy
from fastapi import APIRouter, Path, Query, Request, Response
from numpy.typing import NDArray

from mmwudao.service import schemas
from mmwudao.service.answering import ERRORS, Backend, TheBackend, answer_in_time, json_response
from mmwudao.service.errors import BadInput, NotFound, refusals
from mmwudao.service.inputs import Part
from mmwudao.service.routes_embeddings import embed
from retrieval.collections.opening import Item

router = APIRouter(responses=ERRORS, tags=["search"])

ItemId = Annotated[str, Path(min_length=1, max_length=512)]


@router.post("/v1/search", response_model=schemas.SearchResponse)
async def search(body: schemas.SearchRequest, request: Request, backend: TheBackend) -> Response:
    """The items nearest to a text, a picture or a vector, best first, among those that `where` allows."""
    collection = backend.queues.collection
    backend.decoder.check_count(body.k, backend.config.max_hits, "k")

    async def find() -> list[schemas.SearchHit]:
        vector = (await _vectors(backend, [body]))[0]
        hits = await backend.queues.run_job(
            backend.queues.searches, lambda: collection.search(vector, body.k, body.where)
        )
        return [schemas.SearchHit(id=hit.id, score=hit.score, metadata=hit.metadata) for hit in hits]

    return json_response(schemas.SearchResponse(data=await answer_in_time(request, find(), backend.config.deadline)))


@router.get("/v1/items", response_model=schemas.CollectionResponse)
async def count_items(
    request: Request, backend: TheBackend, where: Annotated[str | None, Query(max_length=4096)] = None
) -> Response:
    """How many items there are, or how many `where` allows."""
    collection = backend.queues.collection
    work = backend.queues.run_job(backend.queues.searches, lambda: collection.count(where))
    count = await answer_in_time(request, work, backend.config.deadline)
    return json_response(schemas.CollectionResponse(count=count, dim=collection.dim, model=collection.model))


@router.post("/v1/items", response_model=schemas.BulkResponse)
async def add_items(body: schemas.BulkRequest, request: Request, backend: TheBackend) -> Response:
    """Store all of many items, or none."""
    backend.decoder.check_count(len(body.items), backend.config.max_inputs, "items")
    await answer_in_time(request, _store(backend, body.items, body.mode == "add"), backend.config.deadline)
    return json_response(schemas.BulkResponse(stored=len(body.items)))


@router.put("/v1/items/{id:path}", response_model=schemas.BulkResponse)
async def put_item(id: ItemId, body: schemas.ItemBody, request: Request, backend: TheBackend) -> Response:
    """Store an item, in place of one with that id."""
    item = schemas.NewItem(id=id, **body.model_dump())
    await answer_in_time(request, _store(backend, [item], False), backend.config.deadline)
    return json_response(schemas.BulkResponse(stored=1))


@router.get("/v1/items/{id:path}", response_model=schemas.StoredItem)
async def get_item(
    id: ItemId,
    request: Request,
    backend: TheBackend,
    vector: Annotated[bool, Query(description="Whether to send the vector too.")] = False,
) -> Response:
    """One item."""
    collection = backend.queues.collection
    work = backend.queues.run_job(backend.queues.searches, lambda: collection.get([id]))
    items = await answer_in_time(request, work, backend.config.deadline)
    if not items:
        raise NotFound("no item with that id", param="id")
    numbers = items[0].vector.tolist() if vector else None
    return json_response(schemas.StoredItem(id=items[0].id, metadata=items[0].metadata, vector=numbers))


@router.delete("/v1/items/{id:path}", response_model=schemas.DeletedItem)
async def delete_item(id: ItemId, request: Request, backend: TheBackend) -> Response:
    """Remove an item."""
    collection = backend.queues.collection
    work = backend.queues.run_job(backend.queues.writes, lambda: collection.delete([id]))
    if not await answer_in_time(request, work, backend.config.deadline):
        raise NotFound("no item with that id", param="id")
    return json_response(schemas.DeletedItem(id=id, deleted=True))


async def _store(backend: Backend, bodies: list[schemas.NewItem], new: bool) -> None:
    collection = backend.queues.collection
    ids = [body.id for body in bodies]
    if len(set(ids)) < len(ids):
        raise BadInput("an id is given twice", param="items")
    vectors = await _vectors(backend, bodies)
    items = [Item(body.id, vector, body.metadata) for body, vector in zip(bodies, vectors, strict=True)]

    write = collection.add if new else collection.upsert
    with refusals("items" if new else None):
        await backend.queues.run_job(backend.queues.writes, lambda: write(items))


async def _vectors(
    backend: Backend, bodies: list[schemas.SearchRequest] | list[schemas.NewItem]
) -> list[NDArray[numpy.float32]]:
    """The vector that each body gives, or that of its text or picture. Raises `ServiceError`s."""
    parts: list[Part] = []
    for body in bodies:
        if body.text is not None:
            parts.append(schemas.TextPart(text=body.text))
        elif body.image is not None:
            parts.append(schemas.ImagePart(image=body.image))
    embedded = iter(await embed(backend, parts, "items") if parts else [])
    return [
        next(embedded).vector if body.vector is None else _given_vector(body.vector, backend.queues.collection.dim)
        for body in bodies
    ]


def _given_vector(numbers: list[float], dim: int) -> NDArray[numpy.float32]:
    if len(numbers) != dim:
        raise BadInput(f"a vector of {len(numbers)} numbers: this collection's have {dim}", param="vector")
    with numpy.errstate(over="ignore"):
        vector = numpy.asarray(numbers, dtype=numpy.float32)
        length = float(numpy.linalg.norm(vector))
    if not 0 < length < numpy.inf:
        raise BadInput("a vector must have a length above 0 that float32 can hold", param="vector")
    return vector
