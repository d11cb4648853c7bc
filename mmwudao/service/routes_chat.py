"""`/v1/chat/completions` as OpenAI has it: a question about a picture, and its answer."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from PIL import Image

from mmwudao.asking import Answer, Asking, check_asking
from mmwudao.service.answering import ERRORS, TheBackend, answer_in_time, json_response
from mmwudao.service.errors import BadInput, refusals
from mmwudao.service.routes_pictures import run_task
from mmwudao.service.schemas_chat import (
    ChatAnswer,
    ChatChoice,
    ChatCompletion,
    ChatImagePart,
    ChatMessage,
    ChatRequest,
    ChatUsage,
)

router = APIRouter(responses=ERRORS, tags=["pictures"])


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def chat_completions(body: ChatRequest, request: Request, backend: TheBackend) -> Response:
    """The answer to a question about a picture. Each question is answered for itself: earlier ones are not read.

    With `stream`, server-sent events as of OpenAI: chat.completion.chunk, and [DONE].
    """
    backend.queues.check_model(body.model)
    generator = backend.queues.generator
    question, source, place = read_conversation(body.messages)
    most = body.max_completion_tokens or body.max_tokens
    asking = Asking((question,), body.language, tuple(body.among or ()), most)
    with refusals("messages"):
        check_asking(generator, asking)
    backend.log_prompt("question", question)

    def ask(images: list[Image.Image], on_step: Callable[[], None]) -> list[Answer]:
        return generator.ask(images[0], asking, on_step)

    work = run_task(backend, [source], ask, [place])
    (told,) = await answer_in_time(request, work, backend.config.drawing_deadline)
    usage = ChatUsage(prompt_tokens=told.read, completion_tokens=told.written, total_tokens=told.read + told.written)
    completion = ChatCompletion(
        id=f"chatcmpl-{uuid4().hex}",
        created=int(time.time()),
        model=backend.served.name,
        choices=[ChatChoice(message=ChatAnswer(content=told.text))],
        usage=usage,
    )
    if not body.stream:
        return json_response(completion)
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    events = _events(completion, with_usage)
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def read_conversation(messages: list[ChatMessage]) -> tuple[str, str, str]:
    """The question, the picture's data URI or URL, and the picture's place in the request. Raises `BadInput`."""
    last = len(messages) - 1
    if messages[last].role != "user":
        raise BadInput("the last message must be the user's, a question", param=f"messages[{last}].role")
    content = messages[last].content
    texts = [content] if isinstance(content, str) else [part.text for part in content if part.type == "text"]
    question = "\n".join(texts).strip()
    if not question:
        raise BadInput("the last message asks nothing: add a text", param=f"messages[{last}].content")
    for number in range(last, -1, -1):
        content = messages[number].content
        if messages[number].role != "user" or isinstance(content, str):
            continue
        pictures = [(place, part) for place, part in enumerate(content) if isinstance(part, ChatImagePart)]
        if len(pictures) > 1:
            raise BadInput("a question is about one picture: send one", param=f"messages[{number}].content")
        for place, part in pictures:
            return question, part.image_url.url, f"messages[{number}].content[{place}].image_url.url"
    raise BadInput(
        "no picture to ask about: send one as a part {'type': 'image_url', 'image_url': {'url': 'data:image/...'}}",
        param=f"messages[{last}].content",
    )


async def _events(completion: ChatCompletion, with_usage: bool) -> AsyncIterator[bytes]:
    """The events of a stream that tells the answer at once."""
    head: dict[str, Any] = {
        "id": completion.id,
        "object": "chat.completion.chunk",
        "created": completion.created,
        "model": completion.model,
    }
    said = {"role": "assistant", "content": completion.choices[0].message.content}
    for delta, reason in ((said, None), ({}, "stop")):
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        yield _event({**head, "choices": [choice]} | ({"usage": None} if with_usage else {}))
    if with_usage:
        yield _event({**head, "choices": [], "usage": completion.usage.model_dump()})
    yield b"data: [DONE]\n\n"


def _event(record: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(record)}\n\n".encode()
