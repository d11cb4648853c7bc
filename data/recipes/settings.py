"""How a recipe builds: what every recipe asks for. Imports nothing heavy, so that the command line can read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.options import check_options, option
from data.sample import DataError
from data.styles import LANGUAGES

DEFAULT_SIZE = 128  # px


class CheckedSettings:
    """Settings whose numbers are within their limits; what is not is a `DataError`, as all of a recipe's errors are."""

    def __post_init__(self) -> None:
        try:
            check_options(self)
        except ValueError as error:
            raise DataError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class RecipeSettings(CheckedSettings):
    """How to build. Raises `DataError` for a value out of range."""

    size: int = option(DEFAULT_SIZE, "Render pictures of this many pixels a side.", least=8, most=2048)
    format: str = option("webp", "Store the pictures as webp (lossless) or png.")
    samples_per_shard: int = option(2000, "Put at most this many samples into one tar file.", least=1)
    limit: int | None = option(None, "Keep this many pictures only, chosen by hash.", least=1)
    cache: Path | None = option(None, "Keep the fetched packages in this folder.")
    workers: int | None = option(None, "Render in this many processes; default: one a core.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in ("webp", "png"):
            raise DataError(f"the image format is 'webp' or 'png', not {self.format!r}")


@dataclass(frozen=True, kw_only=True)
class IconSettings(RecipeSettings):
    """How to build icons. Raises `DataError` for a value out of range."""

    file_types: bool = option(False, "Take the sets for types of files and folders, too: many of them are logos.")
    monochrome: int | None = option(None, "Build this many icons of one colour instead, in drawn colours.", least=1)


@dataclass(frozen=True, kw_only=True)
class EasyVqaSettings(CheckedSettings):
    """How to build easy-VQA. Raises `DataError` for a value out of range."""

    samples_per_shard: int = option(2000, "Put at most this many samples into one tar file.", least=1)
    limit: int | None = option(None, "Keep this many pictures of each split only, chosen by hash.", least=1)
    cache: Path | None = option(None, "Keep the fetched package in this folder.")


@dataclass(frozen=True, kw_only=True)
class QuestionSettings(CheckedSettings):
    """How to ask about pictures. Raises `DataError` for a value out of range."""

    scenes: float = option(0.5, "Make this many scenes of several pictures for each picture.", least=0, most=10)
    samples_per_shard: int = option(2000, "Put at most this many samples into one tar file.", least=1)
    limit: int | None = option(None, "Ask about this many pictures of each split only, chosen by hash.", least=1)


@dataclass(frozen=True, kw_only=True)
class TextSettings(CheckedSettings):
    """How to build texts. Raises `DataError` for a value out of range."""

    languages: str = option(",".join(LANGUAGES), "Build these languages only, as in zh,en.")
    shards: list[str] = option([], "Add the names and keywords in the training split of these shards; repeat.")
    limit: int | None = option(None, "Keep this many texts only, chosen by hash.", least=1)
    cache: Path | None = option(None, "Keep the fetched packages in this folder.")

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [language for language in self.languages.split(",") if language not in LANGUAGES]
        if unknown:
            raise DataError(f"unknown language {unknown[0]!r}; known: {', '.join(LANGUAGES)}")
