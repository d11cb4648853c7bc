"""One sample, a picture with its captions as a rule, as a webdataset shard stores it."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from data.characters import BYTE_ORDER_MARK, decode_text, is_blank, is_unicode, whole_characters
from data.records import parse_json

# jfif, jpe and jif are JPEG; what the bytes hold decides in any case
IMAGE_EXTENSIONS = ("png", "webp", "jpg", "jpeg", "jfif", "jpe", "jif", "gif", "bmp", "tif", "tiff", "avif")
UNKNOWN_LANGUAGE = "und"  # ISO 639-2 "undetermined"
MAX_ID_LENGTH = 400  # characters; stores take 512, and a caption's item adds its language
Needed = bool | Literal["or questions"]  # whether a picture needs a caption, or a question in its place
LANGUAGE_TAG = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8}){0,4}")


class DataError(ValueError):
    """Bad input data; the message is one line that says what was wrong and what to do."""


class DoubledMember(DataError):
    """A sample has two pictures or two captions, of which nobody says which one is meant."""


@dataclass(frozen=True)
class Caption:
    """What is said about a picture in one language: a name, and keywords that are only loosely related to it.

    `others` are further captions, as good as `name`.
    """

    name: str
    keywords: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """A question about a picture and its answer, in one language. `kind` sorts questions, such as "colour"."""

    language: str
    question: str
    answer: str
    kind: str = ""


@dataclass
class Sample:
    """An encoded picture, captions by language code, or both, and perhaps questions about the picture.

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
    questions: tuple[Question, ...] = ()

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
        record: dict[str, Any] = {
            "id": self.id,
            "captions": {
                language: {"name": caption.name, "keywords": list(caption.keywords)}
                | ({"others": list(caption.others)} if caption.others else {})
                for language, caption in sorted(self.captions.items())
            },
            "family": self.family,
            "concept": self.concept,
            "base_concept": self.base_concept,
            "licence": self.licence,
            "source": self.source,
        }
        if self.questions:
            record["questions"] = [asdict(question) for question in self.questions]
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        picture = {} if self.image is None else {self.extension: self.image}
        return {**picture, "json": text.encode()}

    @classmethod
    def from_members(cls, key: str, members: dict[str, bytes], captions: bool = True) -> Sample:
        """Read our own members, or those of img2dataset (`.jpg` + `.txt` + `.json`); without `captions`, not those.

        The picture or the captions may be missing; callers that need them call `require_image` or `require_captions`.
        What else a record says of the picture is stored as text, whatever its type. Raises `DataError` when the JSON,
        a caption or a question is broken, and `DoubledMember` for two pictures or captions.
        """
        pictures = [extension for extension in IMAGE_EXTENSIONS if extension in members]
        if len(pictures) > 1:
            raise DoubledMember(
                f"sample {key}: it has two pictures, .{pictures[0]} and .{pictures[1]}: leave one out, or give each a "
                "name of its own"
            )
        extension = pictures[0] if pictures else ""
        record: dict[str, Any] = {}
        if "json" in members:
            try:
                record = parse_json(members["json"])
            except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                raise DataError(f"sample {key}: its .json is not JSON ({error})") from error
            if not isinstance(record, dict):
                raise DataError(f"sample {key}: its .json is not an object")
        return cls(
            # img2dataset repeats the key inside its JSON; our shards carry an id of their own
            id=_identity(record.get("id")) or _identity(record.get("key")) or _identity(key) or "_",
            image=members.get(extension),
            extension=extension,
            captions=_captions(key, record, members.get("txt")) if captions else {},
            family=_as_text(record.get("family")),
            concept=_as_text(record.get("concept")),
            base_concept=_as_text(record.get("base_concept")),
            licence=_as_text(record.get("licence")),
            source=_as_text(record.get("source")) or _as_text(record.get("url")),
            questions=_questions(key, record.get("questions")),
        )


def _identity(value: object) -> str | None:
    """An id that every store takes; a list or an object is none. Ids that are too long end in a digest."""
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        return None
    text = whole_characters(str(value)).replace("\0", "\ufffd")
    if len(text) > MAX_ID_LENGTH:
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        text = f"{text[: MAX_ID_LENGTH - 13]}-{digest}"
    return text


def _as_text(value: object) -> str | None:
    """A value of a record as text that every store takes; nothing for null, NaN and what is empty."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or value in ("", [], {}):
        return None
    return whole_characters(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _captions(key: str, record: dict[str, Any], text: bytes | None) -> dict[str, Caption]:
    """What the record says by language, else the .txt, else the caption that img2dataset writes into the record."""
    captions = _captions_by_language(key, record.get("captions"))
    if text is not None:
        try:
            told = _captions_by_language(key, decode_text(text))
        except UnicodeDecodeError as error:
            raise DataError(f"sample {key}: its .txt is not UTF-8") from error
        names = {name for caption in captions.values() for name in (caption.name, *caption.others)}
        if captions and told and told[UNKNOWN_LANGUAGE].name not in names:
            raise DoubledMember(f"sample {key}: its .json and its .txt hold captions that differ: leave one out")
        captions = captions or told
    return captions or _captions_by_language(key, record.get("caption"))


def _captions_by_language(key: str, stored: object) -> dict[str, Caption]:
    """Captions by language, or of no language: a text, a list of texts, or an object of these by language."""
    if not isinstance(stored, dict):
        stored = {UNKNOWN_LANGUAGE: stored}
    captions: dict[str, Caption] = {}
    for language, entry in stored.items():
        if not is_language(language):
            raise DataError(f"sample {key}: {language[:40]!r} is no language code such as zh, en or und")
        if _is_nothing(entry):
            continue
        code = language_code(language)
        if not isinstance(entry, dict):
            entry = {"name": entry}
        if not entry.keys() & {"name", "keywords"} or not isinstance(entry.get("keywords") or [], list):
            raise DataError(f"sample {key}: the caption in {language!r} needs a 'name' and a list of 'keywords'")
        place = f"sample {key}: the caption in {language!r}"
        names = _texts(place, entry.get("name")) + _texts(place, entry.get("others"))
        words = _texts(place, entry.get("keywords"))
        if names or words:
            if code in captions:  # spelled in two ways, as EN and en
                first = captions[code]
                names, words = [first.name, *first.others, *names], list(dict.fromkeys([*first.keywords, *words]))
            names = list(dict.fromkeys(names)) or [", ".join(words)]
            captions[code] = Caption(names[0], tuple(words), tuple(names[1:]))
    return captions


def _questions(key: str, stored: object) -> tuple[Question, ...]:
    """The questions of a record: a list of objects with a question, its answer and perhaps a language and a kind."""
    if _is_nothing(stored):
        return ()
    if not isinstance(stored, list):
        raise DataError(f"sample {key}: 'questions' is no list of objects with a 'question' and an 'answer'")
    return tuple(_question(f"sample {key}: question {number}", entry) for number, entry in enumerate(stored, start=1))


def _question(place: str, entry: object) -> Question:
    fields = entry if isinstance(entry, dict) else {}
    said = {}
    for name in ("question", "answer"):
        texts = _texts(f"{place}: its {name}", fields.get(name))
        if len(texts) != 1:  # a list of answers has no place to go
            raise DataError(f"{place} needs one 'question' and one 'answer', each a text that is not blank")
        said[name] = texts[0]
    language = fields.get("language") or UNKNOWN_LANGUAGE
    if not isinstance(language, str) or not is_language(language):
        raise DataError(f"{place}: {str(language)[:40]!r} is no language code such as zh, en or und")
    return Question(language_code(language), said["question"], said["answer"], _as_text(fields.get("kind")) or "")


def is_language(code: str) -> bool:
    """Whether `code` has the form of a language code: zh, en, pt-BR, und."""
    return LANGUAGE_TAG.fullmatch(code) is not None


@functools.cache
def language_code(code: str) -> str:
    """A language code as RFC 5646 recommends to spell it: en for EN, pt-BR for pt_br, zh-Hans for ZH-hans."""
    first, *rest = code.replace("_", "-").split("-")
    spelled = {2: str.upper, 4: str.title}
    return "-".join([first.lower(), *(spelled.get(len(part), str.lower)(part) for part in rest)])


def _is_nothing(value: object) -> bool:
    """Whether a record has no caption here: null, or an empty text, list or object."""
    return value is None or value in ("", [], {})


def _texts(place: str, value: object) -> list[str]:
    """A text, or the texts of a list, without the spaces around them. Raises `DataError` for anything else."""
    texts = []
    for one in value if isinstance(value, list) else [value]:
        if type(one) is str and one.isascii() and one.isprintable():  # most texts, and the rest need a closer look
            if text := one.strip():
                texts.append(text)
            continue
        if not isinstance(one, str):
            if _is_nothing(one):
                continue
            raise DataError(f"{place} is no text but {str(one)[:40]}")
        if not is_unicode(one):
            raise DataError(f"{place} is not valid Unicode (half of a surrogate pair)")
        if "\0" in one:
            raise DataError(f"{place} holds a NUL character, which no text does: perhaps it is in another encoding")
        text = one.strip().removeprefix(BYTE_ORDER_MARK).strip()
        if not is_blank(text):
            texts.append(text)
    return texts
