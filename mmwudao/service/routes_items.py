"""Search, and the items that are searched: `/v1/search` and `/v1/items`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import numpy
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from numpy.typing import NDArray

from mmwudao.service import schemas
from mmwudao.service.answering import ERRORS, answer_in_time, engine_of, incoming_of, json_response
from mmwudao.service.batching import Batcher
from mmwudao.service.errors import BadInput, Conflict, NotFound
from mmwudao.service.incoming import Incoming, Part
from mmwudao.service.queues import Engine
from mmwudao.service.routes_embeddings import embed
from retrieval.collections.opening import CollectionError, ExistingIdsError, Item

T = TypeVar("T")
Queue = Batcher[Callable[[], Any], Any]

router = APIRouter(responses=ERRORS, tags=["search"])

TheEngine = Annotated[Engine, Depends(engine_of)]
TheIncoming = Annotated[Incoming, Depends(incoming_of)]
ItemId = Annotated[str, Path(min_length=1, max_length=512)]


@router.post("/v1/search", response_model=schemas.SearchAnswer)
async def search(body: schemas.SearchRequest, request: Request, engine: TheEngine, incoming: TheIncoming) -> Response:
    """The items nearest to a text, a picture or a vector, best first, among those that `where` allows."""
    collection = engine.collection
    incoming.check_count(body.k, engine.config.max_hits, "k")

    async def find() -> list[schemas.Found]:
        vector = (await _vectors(engine, incoming, [body]))[0]
        hits = await _ask(engine, engine.searches, lambda: collection.search(vector, body.k, body.where))
        return [schemas.Found(id=hit.id, score=hit.score, metadata=hit.metadata) for hit in hits]

    return json_response(schemas.SearchAnswer(data=await answer_in_time(request, find(), engine.config.deadline)))


@router.get("/v1/items", response_model=schemas.CollectionAnswer)
async def count_items(
    request: Request, engine: TheEngine, where: Annotated[str | None, Query(max_length=4096)] = None
) -> Response:
    """How many items there are, or how many `where` allows."""
    collection = engine.collection
    work = _ask(engine, engine.searches, lambda: collection.count(where))
    count = await answer_in_time(request, work, engine.config.deadline)
    return json_response(schemas.CollectionAnswer(count=count, dim=collection.dim, model=collection.model))


@router.post("/v1/items", response_model=schemas.BulkAnswer)
async def add_items(body: schemas.BulkRequest, request: Request, engine: TheEngine, incoming: TheIncoming) -> Response:
    """Store all of many items, or none."""
    incoming.check_count(len(body.items), engine.config.max_inputs, "items")
    await answer_in_time(request, _store(engine, incoming, body.items, body.mode == "add"), engine.config.deadline)
    return json_response(schemas.BulkAnswer(stored=len(body.items)))


@router.put("/v1/items/{id:path}", response_model=schemas.BulkAnswer)
async def put_item(
    id: ItemId, body: schemas.ItemBody, request: Request, engine: TheEngine, incoming: TheIncoming
) -> Response:
    """Store an item, in place of one with that id."""
    item = schemas.NewItem(id=id, **body.model_dump())
    await answer_in_time(request, _store(engine, incoming, [item], False), engine.config.deadline)
    return json_response(schemas.BulkAnswer(stored=1))


@router.get("/v1/items/{id:path}", response_model=schemas.StoredItem)
async def get_item(
    id: ItemId,
    request: Request,
    engine: TheEngine,
    vector: Annotated[bool, Query(description="Whether to send the vector too.")] = False,
) -> Response:
    """One item."""
    collection = engine.collection
    work = _ask(engine, engine.searches, lambda: collection.get([id]))
    items = await answer_in_time(request, work, engine.config.deadline)
    if not items:
        raise NotFound("no item with that id", param="id")
    numbers = items[0].vector.tolist() if vector else None
    return json_response(schemas.StoredItem(id=items[0].id, metadata=items[0].metadata, vector=numbers))


@router.delete("/v1/items/{id:path}", response_model=schemas.DeletedItem)
async def delete_item(id: ItemId, request: Request, engine: TheEngine) -> Response:
    """Remove an item."""
    collection = engine.collection
    work = _ask(engine, engine.writes, lambda: collection.delete([id]))
    if not await answer_in_time(request, work, engine.config.deadline):
        raise NotFound("no item with that id", param="id")
    return json_response(schemas.DeletedItem(id=id, deleted=True))


async def _ask(engine: Engine, queue: Queue, job: Callable[[], T]) -> T:
    """`job` in a thread of `queue`; what the collection refuses is the client's to know."""
    try:
        return await engine.run_task(queue, job)
    except CollectionError as error:
        raise BadInput(str(error)) from error


async def _store(engine: Engine, incoming: Incoming, bodies: list[schemas.NewItem], new: bool) -> None:
    collection = engine.collection
    ids = [body.id for body in bodies]
    if len(set(ids)) < len(ids):
        raise BadInput("an id is given twice", param="items")
    vectors = await _vectors(engine, incoming, bodies)
    items = [Item(body.id, vector, body.metadata) for body, vector in zip(bodies, vectors, strict=True)]

    def write() -> None:
        if not new:
            collection.upsert(items)
            return
        try:
            collection.add(items)
        except ExistingIdsError as error:
            raise Conflict(str(error), param="items") from error

    await _ask(engine, engine.writes, write)


async def _vectors(
    engine: Engine, incoming: Incoming, bodies: list[schemas.SearchRequest] | list[schemas.NewItem]
) -> list[NDArray[numpy.float32]]:
    """The vector that each body gives or describes. Raises `ServiceError`s."""
    parts: list[Part] = []
    for body in bodies:
        if body.text is not None:
            parts.append(schemas.TextPart(text=body.text))
        elif body.image is not None:
            parts.append(schemas.ImagePart(image=body.image))
    described = iter(await embed(engine, incoming, parts, "items") if parts else [])
    return [
        next(described).vector if body.vector is None else _given_vector(body.vector, engine.collection.dim)
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
