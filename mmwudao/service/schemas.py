"""The bodies of requests and responses. Unknown fields are refused, so that a misspelt option is not ignored.

The limits here hold for every server; `ServiceConfig` has those that an operator may change.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from generation.drawing.sampling import SamplingOptions
from mmwudao.service.bodies import RequestBody, without_nulls
from retrieval.collections.terms import MAX_TERMS, MAX_WEIGHT


class ResponseBody(BaseModel):
    """The base of what clients get."""


def _no_whole_number(value: object) -> object:
    if isinstance(value, int):
        raise ValueError("a whole number must fit 64 bits")  # else the float of the union would take it, rounded
    return value


Identifier = Annotated[str, Field(min_length=1, max_length=512, description="A stable id of the client's choice.")]
Value = (
    Annotated[str, Field(max_length=4096)]
    | StrictBool
    | Annotated[int, Field(ge=-(2**63), lt=2**63)]
    | Annotated[float, BeforeValidator(_no_whole_number), Field(allow_inf_nan=False)]
)
ColumnName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")]
Metadata = Annotated[dict[ColumnName, Value], Field(max_length=64), BeforeValidator(without_nulls)]
Vector = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1, max_length=8192)]
ModelName = Annotated[str | None, Field(description="The served model's name (GET /v1/models), or nothing.")]
User = Annotated[str | None, Field(description="Accepted for compatibility, and not used.")]
Where = Annotated[
    str | None,
    Field(max_length=4096, description="A condition on metadata, such as family = 'noto' AND year > 2016."),
]


class TextPart(RequestBody):
    """A text, even if it begins with data:image/."""

    text: str


class ImagePart(RequestBody):
    """A picture: a data URI (data:image/png;base64,...), or a URL where the server allows it."""

    image: str


Content = str | TextPart | ImagePart


class EmbeddingRequest(RequestBody):
    """A string is a text, or a picture if it begins with data:image/."""

    input: Content | Annotated[list[Content], Field(min_length=1)]
    model: ModelName = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int | None, Field(description="The model's own; others are refused.")] = None
    user: User = None


class Embedding(ResponseBody):
    """One vector of unit length: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(ResponseBody):
    """Tokens of texts; pictures have none."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(ResponseBody):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


SAMPLING_NAMES = tuple(field.name for field in fields(SamplingOptions))


def _sampling_fields() -> dict[str, Any]:
    """The fields of `SamplingOptions` for pydantic, each optional, with its limits and its help."""
    hints, made = get_type_hints(SamplingOptions), {}
    for field in fields(SamplingOptions):
        least, most, above, below = (field.metadata[name] for name in ("least", "most", "above", "below"))
        described = Field(ge=least, le=most, gt=above, lt=below, description=field.metadata["help"])
        made[field.name] = (Annotated[hints[field.name] | None, described], None)
    return made


SamplingRequest: Any = create_model("SamplingRequest", __base__=RequestBody, **_sampling_fields())


class GenerationRequest(SamplingRequest):
    """What to draw. What is not given is the model's own default."""

    prompt: str
    model: ModelName = None
    n: Annotated[int, Field(ge=1, description="Picture k is drawn with seed + k.")] = 1
    size: Annotated[str | None, Field(description="auto, the model's own size, or twice that if it enlarges.")] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**62)] = None
    style: Annotated[str | None, Field(description="A picture family that the model knows.")] = None
    response_format: Annotated[Literal["b64_json"] | None, Field(description="URLs are not offered.")] = None
    output_format: Literal["png"] | None = None
    output_compression: Annotated[Literal[100] | None, Field(description="PNGs lose nothing.")] = None
    # OpenAI's, with the values that ask for nothing
    quality: Annotated[Literal["auto", "standard"] | None, Field(description="There is one.")] = None
    background: Annotated[Literal["auto", "opaque"] | None, Field(description="Pictures are opaque.")] = None
    moderation: Annotated[Literal["auto", "low"] | None, Field(description="There is none.")] = None
    stream: Annotated[bool | None, Field(description="Server-sent events with pictures so far.")] = None
    partial_images: Annotated[int | None, Field(ge=0, le=3, description="Previews in a stream.")] = None
    user: User = None

    @field_validator(*SAMPLING_NAMES)
    @classmethod
    def _allowed(cls, value: Any, info: ValidationInfo) -> Any:
        """What the limits of a field cannot say."""
        if value is not None:
            SamplingOptions(**{str(info.field_name): value})
        return value

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling options that the request gives."""
        return self.model_dump(include=set(SAMPLING_NAMES), exclude_none=True)


class EditRequest(GenerationRequest):
    """What to draw into a picture. The fields of a form: `image` and `mask` are files beside them."""

    extend: Annotated[
        str | None,
        Field(description="Instead of a mask: keep all, and go on beyond a side by a share of the picture: left:0.25."),
    ] = None
    input_fidelity: Annotated[
        Literal["high", "low"] | None, Field(description="OpenAI's; what is kept is always kept as it is.")
    ] = None


class VariationRequest(GenerationRequest):
    """What a picture becomes. The fields of a form: `image` is a file beside them."""

    prompt: Annotated[str, Field(description="What it shows; without one the model describes the picture itself.")] = ""
    strength: Annotated[
        float, Field(gt=0, le=1, allow_inf_nan=False, description="How much of the picture is drawn anew.")
    ] = 0.5


class DrawnImage(ResponseBody):
    """A PNG that holds its own recipe."""

    b64_json: str
    seed: int
    revised_prompt: Annotated[
        str | None, Field(description="What the model has read, where the prompt is longer than it reads.")
    ] = None


class ImagesResponse(ResponseBody):
    created: int
    data: list[DrawnImage]
    size: str
    output_format: Literal["png"] = "png"


Pictures = Annotated[list[str | ImagePart], Field(min_length=1, description="Data URIs, or URLs where allowed.")]


class CaptionRequest(RequestBody):
    images: Pictures
    language: Annotated[str | None, Field(description="One that the model knows; default: its first.")] = None
    model: ModelName = None


class PictureCaption(ResponseBody):
    index: int
    language: Annotated[str | None, Field(description="None: the model has one, which it does not name.")]
    caption: str


class CaptionList(ResponseBody):
    object: Literal["list"] = "list"
    data: list[PictureCaption]
    model: str


class RerankRequest(RequestBody):
    """Which pictures show the query best?"""

    query: str
    documents: Pictures
    top_n: Annotated[int | None, Field(ge=1)] = None
    return_documents: Annotated[Literal[False] | None, Field(description="Pictures are not sent back.")] = None
    by: Annotated[
        Literal["caption", "towers", "both"] | None, Field(description="Who judges; default: towers if there are any.")
    ] = None
    model: ModelName = None


class Ranked(ResponseBody):
    index: int
    relevance_score: float


class RerankResponse(ResponseBody):
    """Best first. Scores compare pictures for one query, not queries."""

    object: Literal["list"] = "list"
    results: list[Ranked]
    model: str


def one_of(*names: str) -> dict[str, Any]:
    """That exactly one of these fields is given, in the OpenAPI description; a validator checks it."""
    kinds = {"text": "string", "image": "string", "vector": "array", "terms": "array"}
    return {"oneOf": [{"required": [name], "properties": {name: {"type": kinds[name]}}} for name in names]}


class TextImageOrVector(RequestBody):
    """Exactly one of a text, a picture and a vector."""

    model_config = ConfigDict(json_schema_extra=one_of("text", "image", "vector"))

    text: str | None = None
    image: Annotated[str | None, Field(description="A data URI, or a URL where the server allows it.")] = None
    vector: Vector | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.text, self.image, self.vector)) != 1:
            raise ValueError("give exactly one of text, image and vector")
        return self


class SearchTerm(TextImageOrVector):
    """One of the terms that a search adds up."""

    weight: Annotated[
        float,
        Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False, description="Below 0: subtract it; never 0."),
    ] = 1.0

    @field_validator("weight")
    @classmethod
    def _counts(cls, weight: float) -> float:
        if weight == 0:
            raise ValueError("a weight is not 0: leave the term out")
        return weight


class SearchRequest(RequestBody):
    """Exactly one of a text, a picture, a vector, and a list of these with weights, which are added up."""

    model_config = ConfigDict(json_schema_extra=one_of("text", "image", "vector", "terms"))

    text: str | None = None
    image: Annotated[str | None, Field(description="A data URI, or a URL where the server allows it.")] = None
    vector: Vector | None = None
    terms: Annotated[
        list[SearchTerm] | None,
        Field(min_length=1, max_length=MAX_TERMS, description="Each counts as a vector of length 1 times its weight."),
    ] = None
    k: Annotated[int, Field(ge=1)] = 10
    where: Where = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.text, self.image, self.vector, self.terms)) != 1:
            raise ValueError("give exactly one of text, image, vector and terms")
        return self


class SearchHit(ResponseBody):
    id: str
    score: float
    metadata: dict[str, str | bool | int | float]


class SearchResponse(ResponseBody):
    """Best first; scores are cosines."""

    object: Literal["list"] = "list"
    data: list[SearchHit]


class ItemBody(TextImageOrVector):
    metadata: Metadata = {}


class NewItem(ItemBody):
    id: Identifier


class BulkRequest(RequestBody):
    items: Annotated[list[NewItem], Field(min_length=1)]
    mode: Annotated[Literal["upsert", "add"], Field(description="add refuses ids that are there already.")] = "upsert"


class BulkResponse(ResponseBody):
    stored: int


class StoredItem(ResponseBody):
    id: str
    metadata: dict[str, str | bool | int | float]
    vector: Annotated[list[float] | None, Field(description="Only if asked for.")] = None


class DeletedItem(ResponseBody):
    id: str
    deleted: bool


class CollectionResponse(ResponseBody):
    count: int
    dim: int
    model: str
    ids: Annotated[list[str] | None, Field(description="With `limit`: sorted by code points.")] = None


Ids = Annotated[list[Identifier], Field(min_length=1)]


class IdsRequest(RequestBody):
    """Items by their ids, for ids that no URL can hold as they are (`.`, `..`), and for many at a time."""

    ids: Ids
    vector: Annotated[bool, Field(description="Whether to send the vectors too.")] = False


class DeleteRequest(RequestBody):
    ids: Ids


class StoredItems(ResponseBody):
    """In the order of the request; ids of no item are left out."""

    object: Literal["list"] = "list"
    data: list[StoredItem]


class DeletedItems(ResponseBody):
    deleted: int


class ModelCard(ResponseBody):
    id: str
    object: Literal["model"] = "model"
    created: Annotated[int, Field(description="When this server was started, in seconds since 1970.")]
    owned_by: Literal["mmwudao"] = "mmwudao"
    can: Annotated[list[str], Field(description="Among embed, draw, caption, answer, search.")]


class ModelList(ResponseBody):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(ResponseBody):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(ResponseBody):
    """Every answer with a status from 400 on."""

    error: ErrorBody
