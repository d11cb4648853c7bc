"""How data are packed, and when pictures are near copies.

The command line reads help and limits here, so nothing heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass

from data.options import COUNT, SIDE, check_options, option
from data.sample import UNKNOWN_LANGUAGE, DataError, is_language

LEAST_SIDE = 8  # px, of a picture that is tokenized
MAX_PIXELS = 2**26  # 67 megapixels: 200 MB once decoded


@dataclass(frozen=True)
class PackSettings:
    """How to pack. Raises `DataError` for a value out of range."""

    image_size: int | None = option(
        None, "Resize the shorter side to this many pixels and crop the centre; default: keep the size.",
        least=8, most=4096,
    )  # fmt: skip
    language: str = option(UNKNOWN_LANGUAGE, "The language of captions that name none: zh, en, ...; und: unknown.")
    samples_per_shard: int = option(2000, "Put at most this many samples into one tar file.", least=1, most=COUNT)
    max_pixels: int = option(MAX_PIXELS, "Skip pictures of more pixels than this.", least=1, most=COUNT)
    test_fraction: float = option(0.0, "Put this share of the samples into a test split.", least=0, below=1)
    strict: bool = option(False, "Stop at the first bad sample instead of skipping it.")
    uncaptioned: bool = option(
        False, "Pack pictures without a caption too, which can be embedded and searched, and train the image tokenizer."
    )

    def __post_init__(self) -> None:
        try:
            check_options(self)
        except ValueError as error:
            raise DataError(str(error)) from error
        if not is_language(self.language):
            raise DataError(f"{self.language!r} is no language code such as zh, en or und")


@dataclass(frozen=True, kw_only=True)
class NearSettings:
    """When two pictures count as near copies. Raises `DataError` for a value out of range."""

    distance: int = option(6, "Call pictures near copies up to this many differing bits of their pHash of 64.",
                           least=0, most=64)  # fmt: skip
    colour: float = option(0.06, "And up to this mean difference of their colours, of 0 to 1.", least=0, most=1)

    def __post_init__(self) -> None:
        try:
            check_options(self)
        except ValueError as error:
            raise DataError(str(error)) from error


@dataclass(frozen=True)
class TokenizeSettings:
    """How shards are encoded: pictures of `image_size` px square, `batch_size` at a time.

    `workers` threads each decode and encode a batch; None: one a core. With `draft`, large JPEGs are decoded at a
    fraction of their size, at least twice `image_size`, and pixels come out a few grey levels off. `strict` stops at
    the first unreadable picture. `progress` shows a bar. `augment` other views of each picture of the
    split `augment_split` are encoded, too (`data.augment`).
    """

    image_size: int = option(
        help="Crop pictures to a square of this many pixels; by default they stay as they are.",
        least=LEAST_SIDE,
        most=SIDE,
    )
    batch_size: int = option(64, "Encode this many pictures at a time.", least=1, most=2**16)
    samples_per_shard: int = option(10_000, "Put at most this many samples into one tar file.", least=1, most=COUNT)
    workers: int | None = option(
        None, "Work on this many batches of shards at a time; default: one for each core.", least=1, most=1024
    )
    device: str = "cpu"
    progress: bool = True
    strict: bool = False
    draft: bool = False
    augment: int = option(
        0, "Also encode this many views of each picture, shifted, scaled and mirrored.", least=0, most=1000
    )
    augment_split: str = "train"

    def __post_init__(self) -> None:
        check_options(self)
