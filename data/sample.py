"""One sample, a picture with its captions as a rule, as a webdataset shard stores it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

IMAGE_EXTENSIONS = ("png", "webp", "jpg", "jpeg")
UNKNOWN_LANGUAGE = "und"  # ISO 639-2 "undetermined"


class DataError(ValueError):
    """Bad input data; the message is one line that says what was wrong and what to do."""


@dataclass(frozen=True)
class Caption:
    """What is said about a picture in one language: a name, and keywords that are only loosely related to it."""

    name: str
    keywords: tuple[str, ...] = ()


@dataclass
class Sample:
    """An encoded picture, captions by language code, or both.

    Without a picture `image` is None and `extension` is empty; without a text `captions` is empty.
    """

    id: str
    image: bytes | None
    extension: str
    captions: dict[str, Caption] = field(default_factory=dict)
    family: str | None = None
    concept: str | None = None
    base_concept: str | None = None
    licence: str | None = None
    source: str | None = None

    def require_image(self) -> bytes:
        """The encoded picture. Raises `DataError` when there is none."""
        if self.image is None:
            raise DataError(f"sample {self.id}: no picture (looked for {', '.join(IMAGE_EXTENSIONS)})")
        return self.image

    def require_captions(self) -> dict[str, Caption]:
        """The captions by language. Raises `DataError` when there is none."""
        if not self.captions:
            raise DataError(f"sample {self.id}: no caption in .txt or .json")
        return self.captions

    def to_members(self) -> dict[str, bytes]:
        """The tar members of this sample, extension -> bytes (deterministic)."""
        record = {
            "id": self.id,
            "captions": {
                language: {"name": caption.name, "keywords": list(caption.keywords)}
                for language, caption in sorted(self.captions.items())
            },
            "family": self.family,
            "concept": self.concept,
            "base_concept": self.base_concept,
            "licence": self.licence,
            "source": self.source,
        }
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        picture = {} if self.image is None else {self.extension: self.image}
        return {**picture, "json": text.encode()}

    @classmethod
    def from_members(cls, key: str, members: dict[str, bytes]) -> Sample:
        """Read our own members, or those of img2dataset (`.jpg` + `.txt` + `.json`).

        The picture or the captions may be missing; callers that need them call `require_image` or `require_captions`.
        Raises `DataError` when the JSON or the text is broken.
        """
        extension = next((e for e in IMAGE_EXTENSIONS if e in members), "")
        record: dict[str, Any] = {}
        if "json" in members:
            try:
                record = json.loads(members["json"])
            except ValueError as error:  # UnicodeDecodeError and JSONDecodeError both
                raise DataError(f"sample {key}: its .json is not JSON ({error})") from error
            if not isinstance(record, dict):
                raise DataError(f"sample {key}: its .json is not an object")
        return cls(
            # img2dataset repeats the key inside its JSON; our shards carry an id of their own
            id=str(record.get("id") or record.get("key") or key),
            image=members.get(extension),
            extension=extension,
            captions=_captions(key, record, members.get("txt")),
            family=record.get("family"),
            concept=record.get("concept"),
            base_concept=record.get("base_concept"),
            licence=record.get("licence"),
            source=record.get("source") or record.get("url"),
        )


def _captions(key: str, record: dict[str, Any], text: bytes | None) -> dict[str, Caption]:
    captions = {}
    stored = record.get("captions") or {}
    if not isinstance(stored, dict):
        raise DataError(f"sample {key}: 'captions' must map languages to names and keywords")
    for language, entry in stored.items():
        if isinstance(entry, str):
            entry = {"name": entry}
        if not isinstance(entry, dict) or not isinstance(entry.get("keywords", []), list):
            raise DataError(f"sample {key}: the caption in {language!r} needs a 'name' and a list of 'keywords'")
        name = str(entry.get("name") or "").strip()
        keywords = tuple(str(word) for word in entry.get("keywords", []))
        if name or keywords:
            captions[language] = Caption(name or ", ".join(keywords), keywords)
    if not captions:
        try:
            plain = text.decode() if text is not None else str(record.get("caption") or "")
        except UnicodeDecodeError as error:
            raise DataError(f"sample {key}: its .txt is not UTF-8") from error
        if plain.strip():
            captions[UNKNOWN_LANGUAGE] = Caption(plain.strip())
    return captions
