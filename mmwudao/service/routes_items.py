"""Search, and the items that are searched: `/v1/search` and `/v1/items`."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import chain
from typing import Annotated

import numpy
from fastapi import APIRouter, Path, Query, Request, Response
from numpy.typing import NDArray
from starlette.convertors import Convertor, register_url_convertor

from mmwudao.service import schemas
from mmwudao.service.answering import ERRORS, Backend, TheBackend, answer_in_time, json_response
from mmwudao.service.errors import BadInput, NotFound, refusals
from mmwudao.service.inputs import Part
from mmwudao.service.routes_embeddings import embed
from retrieval.collections.opening import MAX_ID, Collection, Item
from retrieval.collections.query import combine

router = APIRouter(responses=ERRORS, tags=["search"])


class AnyText(Convertor[str]):
    """All that follows in a path: ids may hold slashes and line breaks, which the framework's `path` stops at."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("anything", AnyText())

ItemId = Annotated[str, Path(min_length=1, max_length=MAX_ID)]


@router.post("/v1/search", response_model=schemas.SearchResponse)
async def search(body: schemas.SearchRequest, request: Request, backend: TheBackend) -> Response:
    """The items nearest to a text, a picture, a vector or a sum of these, best first, of those that `where` allows."""
    collection = backend.queues.collection
    backend.decoder.check_count(body.k, backend.config.max_hits, "k")

    async def find() -> list[schemas.SearchHit]:
        vector = await _query_vector(backend, body)
        with refusals("where"):
            hits = await backend.queues.run_job(
                backend.queues.searches, lambda: collection.search(vector, body.k, body.where)
            )
        return [schemas.SearchHit(id=hit.id, score=hit.score, metadata=hit.metadata) for hit in hits]

    return json_response(schemas.SearchResponse(data=await answer_in_time(request, find(), backend.config.deadline)))


@router.get("/v1/items", response_model=schemas.CollectionResponse)
async def count_items(
    request: Request,
    backend: TheBackend,
    where: Annotated[str | None, Query(max_length=4096)] = None,
    limit: Annotated[int | None, Query(ge=1, description="List so many ids, too; each page reads all ids.")] = None,
    after: Annotated[str, Query(max_length=MAX_ID, description="List those after this one, the last known.")] = "",
) -> Response:
    """How many items there are, or how many `where` allows; with `limit`, a page of their ids."""
    collection = backend.queues.collection
    if limit is not None:
        backend.decoder.check_count(limit, backend.config.max_hits, "limit")

    def look() -> schemas.CollectionResponse:
        ids = None if limit is None else _page(collection, where, after, limit)
        return schemas.CollectionResponse(
            count=collection.count(where), dim=collection.dim, model=collection.model, ids=ids
        )

    with refusals("where"):
        found = await answer_in_time(
            request, backend.queues.run_job(backend.queues.searches, look), backend.config.deadline
        )
    return json_response(found.model_dump(exclude_none=True))


def _page(collection: Collection, where: str | None, after: str, limit: int) -> list[str]:
    """The first `limit` ids after `after`, in the order of code points."""
    ids = chain.from_iterable(collection.ids(where))
    return heapq.nsmallest(limit, (one for one in ids if one > after))


@router.post("/v1/items", response_model=schemas.BulkResponse)
async def add_items(body: schemas.BulkRequest, request: Request, backend: TheBackend) -> Response:
    """Store all of many items, or none."""
    backend.decoder.check_count(len(body.items), backend.config.max_inputs, "items")
    places = [f"items[{k}]." for k in range(len(body.items))]
    await answer_in_time(request, _store(backend, body.items, places, body.mode == "add"), backend.config.deadline)
    return json_response(schemas.BulkResponse(stored=len(body.items)))


@router.post("/v1/items/get", response_model=schemas.StoredItems)
async def get_items(body: schemas.IdsRequest, request: Request, backend: TheBackend) -> Response:
    """Items by their ids."""
    collection = backend.queues.collection
    backend.decoder.check_count(len(body.ids), backend.config.max_hits, "ids")
    with refusals("ids"):
        work = backend.queues.run_job(backend.queues.searches, lambda: collection.get(body.ids))
        items = await answer_in_time(request, work, backend.config.deadline)
    return json_response(schemas.StoredItems(data=[_stored(item, body.vector) for item in items]))


@router.post("/v1/items/delete", response_model=schemas.DeletedItems)
async def delete_items(body: schemas.DeleteRequest, request: Request, backend: TheBackend) -> Response:
    """Remove items by their ids; those of no item are passed over."""
    collection = backend.queues.collection
    backend.decoder.check_count(len(body.ids), backend.config.max_hits, "ids")
    with refusals("ids"):
        work = backend.queues.run_job(backend.queues.writes, lambda: collection.delete(body.ids))
        count = await answer_in_time(request, work, backend.config.deadline)
    return json_response(schemas.DeletedItems(deleted=count))


@router.put("/v1/items/{id:anything}", response_model=schemas.BulkResponse)
async def put_item(id: ItemId, body: schemas.ItemBody, request: Request, backend: TheBackend) -> Response:
    """Store an item, in place of one with that id."""
    item = schemas.NewItem(id=id, **body.model_dump())
    await answer_in_time(request, _store(backend, [item], [""], False), backend.config.deadline)
    return json_response(schemas.BulkResponse(stored=1))


@router.get("/v1/items/{id:anything}", response_model=schemas.StoredItem)
async def get_item(
    id: ItemId,
    request: Request,
    backend: TheBackend,
    vector: Annotated[bool, Query(description="Whether to send the vector too.")] = False,
) -> Response:
    """One item."""
    collection = backend.queues.collection
    with refusals("id"):
        work = backend.queues.run_job(backend.queues.searches, lambda: collection.get([id]))
        items = await answer_in_time(request, work, backend.config.deadline)
    if not items:
        raise NotFound("no item with that id", param="id")
    return json_response(_stored(items[0], vector))


def _stored(item: Item, vector: bool) -> schemas.StoredItem:
    """An item as it is sent."""
    return schemas.StoredItem(id=item.id, metadata=item.metadata, vector=item.vector.tolist() if vector else None)


@router.delete("/v1/items/{id:anything}", response_model=schemas.DeletedItem)
async def delete_item(id: ItemId, request: Request, backend: TheBackend) -> Response:
    """Remove an item."""
    collection = backend.queues.collection
    with refusals("id"):
        work = backend.queues.run_job(backend.queues.writes, lambda: collection.delete([id]))
        found = await answer_in_time(request, work, backend.config.deadline)
    if not found:
        raise NotFound("no item with that id", param="id")
    return json_response(schemas.DeletedItem(id=id, deleted=True))


async def _store(backend: Backend, bodies: list[schemas.NewItem], places: list[str], new: bool) -> None:
    """Store items, each of which begins at its place in the request; `new`: refuse ids that are there."""
    collection = backend.queues.collection
    ids = [body.id for body in bodies]
    if len(set(ids)) < len(ids):
        raise BadInput("an id is given twice", param="items")
    vectors = await _vectors(backend, bodies, places)
    items = [Item(body.id, vector, body.metadata) for body, vector in zip(bodies, vectors, strict=True)]

    write = collection.add if new else collection.upsert
    with refusals("items" if places[0] else "metadata"):
        await backend.queues.run_job(backend.queues.writes, lambda: write(items))


async def _query_vector(backend: Backend, body: schemas.SearchRequest) -> NDArray[numpy.float32]:
    """The vector that is searched for. Raises `ServiceError`s, also for terms that cancel out."""
    if body.terms is None:
        alone = schemas.SearchTerm(text=body.text, image=body.image, vector=body.vector)
        (vector,) = await _vectors(backend, [alone], [""])
        return vector
    vectors = await _vectors(backend, body.terms, [f"terms[{k}]." for k in range(len(body.terms))])
    with refusals("terms"):
        return combine(vectors, [term.weight for term in body.terms])


async def _vectors(
    backend: Backend, bodies: Sequence[schemas.SearchTerm | schemas.NewItem], places: Sequence[str]
) -> list[NDArray[numpy.float32]]:
    """The vector that each body gives, or that of its text or picture. Raises `ServiceError`s with their names."""
    parts: list[Part] = []
    params: list[str] = []
    for body, place in zip(bodies, places, strict=True):
        if body.text is not None:
            parts.append(schemas.TextPart(text=body.text))
            params.append(f"{place}text")
        elif body.image is not None:
            parts.append(schemas.ImagePart(image=body.image))
            params.append(f"{place}image")
    embedded = iter(await embed(backend, parts, params) if parts else [])
    dim = backend.queues.collection.dim
    return [
        next(embedded).vector if body.vector is None else _given_vector(body.vector, dim, f"{place}vector")
        for body, place in zip(bodies, places, strict=True)
    ]


def _given_vector(numbers: list[float], dim: int, param: str) -> NDArray[numpy.float32]:
    if len(numbers) != dim:
        raise BadInput(f"a vector of {len(numbers)} numbers: this collection's have {dim}", param=param)
    with numpy.errstate(over="ignore"):
        vector = numpy.asarray(numbers, dtype=numpy.float32)
        length = float(numpy.linalg.norm(vector))
    if not 0 < length < numpy.inf:
        raise BadInput("a vector must have a length above 0 that float32 can hold", param=param)
    return vector
