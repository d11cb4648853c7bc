"""What a folder of Hugging Face says of its towers: the types that are read, how pictures and texts are prepared.

Nothing is taken from the files but what is named here, so that none of them can name a program, a kernel or an address.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.options import check_options, option
from data.records import parse_json
from retrieval.towers.foreign import check_numbers, read_json_object, read_record
from vqvae.storage.parts import ModelError

LARGEST_SIDE = 4096  # px, of a prepared picture
MOST_PATCHES = 16384
TOKENIZERS = (
    "BertTokenizer", "CLIPTokenizer", "GemmaTokenizer", "PreTrainedTokenizerFast", "Siglip2Tokenizer",
    "SiglipTokenizer", "T5Tokenizer", "XLMRobertaTokenizer",
)  # fmt: skip
# the files that Hugging Face's tokenizers read
TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip
LOWERING = ("SiglipTokenizer", "Siglip2Tokenizer")  # make letters small themselves
PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")
SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
# the settings of pictures that are read, with the limits of each number in them
PICTURE_LIMITS: dict[str, tuple[float, float]] = {
    "size": (1, LARGEST_SIDE), "crop_size": (1, LARGEST_SIDE), "resample": (0, 5), "rescale_factor": (1e-6, 1.0),
    "image_mean": (0.0, 1.0), "image_std": (1e-6, 1000.0), "patch_size": (1, 512), "max_num_patches": (1, MOST_PATCHES),
}  # fmt: skip


@dataclass(frozen=True)
class TowerType:
    """How towers of one `model_type` are built and used."""

    model: str  # the class of transformers
    pictures: str  # the class that prepares pictures, if the folder does not name one
    masked: bool = True  # padding is hidden from attention; SigLIP was trained to see it
    max_tokens: int | None = None  # of the texts that it was trained on, where it has places for more
    lower: bool = False  # texts were in small letters in training


TOWER_TYPES = {
    "clip": TowerType("CLIPModel", "CLIPImageProcessor"),
    "siglip": TowerType("SiglipModel", "SiglipImageProcessor", masked=False, lower=True),
    "siglip2": TowerType("Siglip2Model", "Siglip2ImageProcessor", masked=False, lower=True),
    "altclip": TowerType("AltCLIPModel", "CLIPImageProcessor", max_tokens=77),
    "chinese_clip": TowerType("ChineseCLIPModel", "ChineseCLIPImageProcessor", max_tokens=52),
    "metaclip_2": TowerType("MetaClip2Model", "CLIPImageProcessor"),
}


@dataclass
class TextRules:
    """How texts become tokens."""

    tokenizer: str = option("PreTrainedTokenizerFast", "The class of transformers, one of `TOKENIZERS`.")
    max_tokens: int = option(77, "Texts are cut, and padded on the right, to this many tokens.", least=2, most=8192)
    masked: bool = option(True, "Padding is hidden from attention.")
    lower: bool = option(False, "Texts are made small letters before the tokenizer.")
    prefix: str = option("", "Stands before each text.")

    def __post_init__(self) -> None:
        check_options(self)
        if self.tokenizer not in TOKENIZERS:
            raise ModelError(f"the tokenizer {self.tokenizer!r} is not read; known: {', '.join(TOKENIZERS)}")


def read_hub_config(folder: Path) -> dict[str, Any]:
    """`config.json` without what could name code. Raises `ModelError`, also for a type that is not read."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} is no folder of a model: config.json is missing")
    record = read_json_object(path)
    kind = record.get("model_type")
    if not isinstance(kind, str) or kind not in TOWER_TYPES:
        raise ModelError(f"{folder} holds a model of the type {str(kind)[:60]!r}; read are {', '.join(TOWER_TYPES)}")
    for name in ("config.json", "tokenizer_config.json", *PICTURE_FILES):
        if (folder / name).is_file() and _holds(_read(folder / name), "auto_map"):
            raise ModelError(f"{folder / name} names a program (auto_map), and none is run: import towers without one")
    if "quantization_config" in record:
        raise ModelError(f"{folder} holds quantised weights, which are not read: fetch those in 16 or 32 bits")
    return _without_code(record)


def read_picture_rules(folder: Path, kind: TowerType) -> dict[str, Any]:
    """The class that prepares pictures (`processor`) and its settings, checked. Raises `ModelError`."""
    path = next((folder / name for name in PICTURE_FILES if (folder / name).is_file()), None)
    if path is None:
        raise ModelError(f"{folder} does not say how pictures are prepared: {PICTURE_FILES[0]} is missing")
    record = _read(path)
    record = record.get("image_processor", record) if path.name == PICTURE_FILES[1] else record
    if not isinstance(record, dict):
        raise ModelError(f"{path} is damaged: its image_processor must be an object")
    named = str(record.get("image_processor_type") or record.get("feature_extractor_type") or kind.pictures)
    name = named.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    known = {other.pictures for other in TOWER_TYPES.values()}
    packs = "Siglip2ImageProcessor"
    if name not in known or (name == packs) != (kind.pictures == packs):
        raise ModelError(f"{path} prepares pictures by {named[:60]}, which does not go with a {kind.model}")
    kept = {key: record[key] for key in (*SWITCHES, *PICTURE_LIMITS) if record.get(key) is not None}
    check_picture_rules(kept, path)
    return {"processor": name, **kept}


def check_picture_rules(rules: dict[str, Any], path: Path | str) -> None:
    """Raise `ModelError` for a setting of pictures that is none, or a number out of its limits."""
    for name, value in rules.items():
        if name in SWITCHES and not isinstance(value, bool):
            raise ModelError(f"{path}: {name} must be true or false, not {str(value)[:60]}")
        if name not in PICTURE_LIMITS:
            continue
        least, most = PICTURE_LIMITS[name]
        numbers = list(_numbers(value))
        whole = isinstance(least, int)
        fit = [type(n) in ((int,) if whole else (int, float)) and least <= n <= most for n in numbers]
        if not fit or not all(fit) or (name.startswith("image_") and len(fit) != 3):
            words = "three numbers" if name.startswith("image_") else "a whole number" if whole else "a number"
            raise ModelError(f"{path}: {name} must be {words} from {least} to {most}, not {str(value)[:60]}")


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = [number for number in value.values() if number is not None]
    yield from value if isinstance(value, list) else [value]


def _read(path: Path) -> dict[str, Any]:
    # that of a tokenizer lists all added tokens, and its largest length may be 10^30
    record = read_record(path, parse_json, "a JSON object", 1 << 26)
    if path.name in PICTURE_FILES:
        check_numbers(record, path)
    return record


def _holds(record: Any, name: str) -> bool:
    """Whether a key is anywhere in a record."""
    if isinstance(record, dict):
        return name in record or any(_holds(value, name) for value in record.values())
    return isinstance(record, list) and any(_holds(value, name) for value in record)


def _without_code(record: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what may name kernels or files (`_attn_implementation` and others with such a mark), and dtypes."""
    dropped = ("attn_implementation", "experts_implementation", "torch_dtype", "dtype", "architectures",
               "transformers_version")  # fmt: skip
    return {
        key: _without_code(value) if isinstance(value, dict) else value
        for key, value in record.items()
        if not key.startswith("_") and key not in dropped
    }
