"""The base of the bodies that clients send."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator


def without_nulls(given: object) -> object:
    """An object without its fields that are null; anything else as it is."""
    return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


ABOUT_FIELDS = frozenset({"default", "description", "title"})  # of a field's schema, beside what it may hold


class RequestBody(BaseModel):
    """The base of what clients send. In every field, null is the same as nothing: many clients always send all."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, given: object) -> object:
        return without_nulls(given)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The description with null among what a field that may be left out may hold."""
        described = handler(schema)
        fields = handler.resolve_ref_schema(described)
        for name, field in fields.get("properties", {}).items():
            holds = {key: field.pop(key) for key in list(field) if key not in ABOUT_FIELDS}
            kinds = holds["anyOf"] if "anyOf" in holds else [holds]
            if name not in fields.get("required", ()) and {"type": "null"} not in kinds:
                kinds = [*kinds, {"type": "null"}]
            field |= {"anyOf": kinds} if len(kinds) > 1 else kinds[0]
        return described
