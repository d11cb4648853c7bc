"""The bodies of chat completions, as OpenAI has them, for questions about one picture."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmwudao.asking import MAX_ANSWERS
from mmwudao.service.bodies import RequestBody
from mmwudao.service.schemas import ModelName, ResponseBody, Usage, User


class ImageUrl(RequestBody):
    url: Annotated[str, Field(description="A data URI, or a URL where the server allows it.")]
    detail: Annotated[Literal["auto", "low", "high"] | None, Field(description="There is one.")] = None


class ChatTextPart(RequestBody):
    type: Literal["text"]
    text: str


class ChatImagePart(RequestBody):
    type: Literal["image_url"]
    image_url: ImageUrl


ChatPart = Annotated[ChatTextPart | ChatImagePart, Field(discriminator="type")]


class ChatMessage(RequestBody):
    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        Field(description="Questions and pictures are the user's; what the others say is not read."),
    ]
    content: str | list[ChatPart] = ""
    name: Annotated[str | None, Field(description="Accepted for compatibility, and not used.")] = None


class StreamOptions(RequestBody):
    include_usage: bool = False


class ChatRequest(RequestBody):
    """The last message is a question of the user; the picture is in it, or the last one before it."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    model: ModelName = None
    language: Annotated[str | None, Field(description="That of the question; by default it is guessed.")] = None
    among: Annotated[
        list[str] | None, Field(min_length=1, max_length=MAX_ANSWERS, description="Choose the answer among these.")
    ] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, description="Of the answer.")] = None
    max_tokens: Annotated[int | None, Field(ge=1, description="An older name of max_completion_tokens.")] = None
    stream: Annotated[bool | None, Field(description="Server-sent events; the answer comes in one.")] = None
    stream_options: StreamOptions | None = None
    n: Annotated[Literal[1] | None, Field(description="There is one likeliest answer.")] = None
    # the likeliest answer has no chance in it
    temperature: Annotated[float | None, Field(ge=0, le=2, description="Accepted for compatibility.")] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, description="Accepted for compatibility.")] = None
    seed: Annotated[int | None, Field(description="Accepted for compatibility.")] = None
    user: User = None


class ChatUsage(Usage):
    """Tokens of the picture and the question, and of the answer."""

    completion_tokens: int


class ChatAnswer(ResponseBody):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(ResponseBody):
    index: Literal[0] = 0
    message: ChatAnswer
    finish_reason: Literal["stop"] = "stop"
    logprobs: None = None


class ChatCompletion(ResponseBody):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage
