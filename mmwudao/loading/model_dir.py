"""Model directories: where they are found, what they hold, and how training's outputs become one.

config.json                       `ModelConfig`: the picture size, the styles, the sampling defaults, the parts
tokenizer/, generator/            config.json + model.safetensors each
text.model                        SentencePiece; of an imported model, text.json (`data.framed_text`, or names)
encoder/                          of an imported model, what makes the vectors that it reads for a prompt
upscaler/, towers/                not in every model: super-resolution; image and text embeddings
README.md                         the model card
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from data.atomic import new_folder
from data.config import ConfigError, from_dict, to_dict
from data.framed_text import load_model_text
from data.options import SIDE, check_options, option
from data.records import parse_json
from generation.drawing.sampling import SamplingOptions
from generation.llamagen.encoders import read_encoder_config
from generation.transformer.model import Transformer
from generation.transformer.prompt_features import PromptFeatures
from mmwudao.loading.options import Selection
from vqvae.storage.parts import ModelError, content_hash, load_part, pack_part, stored_hash
from vqvae.tokenizers import ImageTokenizer, load_image_tokenizer

FORMAT = "mmwudao-model/1"
SHIPPED = Path(__file__).parents[1] / "models"
PART_NAMES = ("tokenizer", "generator", "text")  # what draws
OPTIONAL_PARTS = ("encoder", "upscaler", "towers")
PART_FILES = ("config.json", "model.safetensors")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Part:
    """A part's place inside the model directory and the SHA-256 of its content."""

    path: str
    hash: str


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """`config.json` of a model directory. `image_size` in pixels, a side.

    `describes`: whether the generator also tells what a picture shows, after the language's tag (see
    `data.styles.tagged`) or, as CogView's, without one. `answers`: whether it answers questions about a picture.
    """

    name: str
    image_size: int = option(help="The model draws pictures of this many pixels a side.", least=1, most=SIDE)
    styles: tuple[str, ...]
    languages: tuple[str, ...]
    default_sampling: SamplingOptions
    parts: dict[str, Part]
    describes: Literal["no", "tagged", "untagged"] = "no"
    answers: bool = False
    selection: Selection = Selection()

    def __post_init__(self) -> None:
        check_options(self)
        judge = self.selection.judge
        if self.selection.candidates > 1 and judge != "towers" and self.describes == "no":
            raise ValueError(f"selection.judge is {judge}, and the model only draws: let its towers judge")
        if self.selection.candidates > 1 and judge != "caption" and "towers" not in self.parts:
            raise ValueError(f"selection.judge is {judge}, and the model has no towers: let it judge by caption")

    @property
    def model_hash(self) -> str:
        """One SHA-256 over the hashes of the parts that draw: what a picture remembers its model by."""
        drawing = (*PART_NAMES, "encoder")
        lines = (f"{name} {part.hash}\n" for name, part in sorted(self.parts.items()) if name in drawing)
        return sha256("".join(lines).encode()).hexdigest()


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def find_model(model: str | Path) -> Path:
    """The directory of a shipped name, of a folder, or of a hub id (downloaded). Raises `ModelError`."""
    name = str(model)
    if name in shipped_models():
        return SHIPPED / name
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if isinstance(model, str) and HUB_ID.fullmatch(name):
        return _download(name)
    shipped = ", ".join(shipped_models()) or "none"
    raise ModelError(f"no model {name!r}: give a shipped name ({shipped}), a folder, or a hub id (owner/name)")


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    # weights and plain text only: nothing that could run is fetched; towers have their own text tokenizer
    patterns = ["config.json", "README.md", "*.png", "text.model", "text.json", *(f"*/{file}" for file in PART_FILES)]
    patterns += ["towers/*.json", "towers/*.txt", "towers/*.model"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # huggingface_hub's own errors are subclasses of these
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"no folder {hub_id!r}, and the hub did not give a model of that name: {reason[0]}") from error


def read_model_config(folder: Path) -> ModelConfig:
    """`config.json` of a model directory, with every part present. Raises `ModelError`."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} is not a model directory: it has no config.json")
    try:
        record = parse_json(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ModelError(f'{path} does not describe a model: its "format" must be {FORMAT!r}')
    try:
        config = from_dict(ModelConfig, {key: value for key, value in record.items() if key != "format"})
    except ConfigError as error:
        raise ModelError(f"{path}: {error}") from error
    for name in PART_NAMES:
        if name not in config.parts:
            raise ModelError(f"{path} names no {name} among its parts")
    for name in config.parts:
        if name not in (*PART_NAMES, *OPTIONAL_PARTS):
            raise ModelError(f"{path} names a part {name!r}, which this version of mmwudao does not know")
        part = config.parts[name].path
        if Path(part).is_absolute() or ".." in Path(part).parts:
            raise ModelError(f"{path}: the path of {name} must lie inside the model directory, not {part!r}")
        if not (folder / part).exists():
            raise ModelError(f"{folder} is incomplete: {part} ({name}) is missing")
    return config


def load_tokenizer(model: str | Path) -> ImageTokenizer:
    """The image tokenizer of a model, or of a folder that holds a trained tokenizer alone. Raises `ModelError`."""
    if (Path(model) / "model.safetensors").exists():
        return load_image_tokenizer(model)
    folder = find_model(model)
    part = read_model_config(folder).parts["tokenizer"]
    tokenizer = load_image_tokenizer(folder / part.path)
    check_hash(folder, "tokenizer", content_hash(tokenizer), part.hash)
    return tokenizer


def check_hash(folder: Path, part: str, found: str, expected: str) -> None:
    """`ModelError` unless a part is the one that config.json names."""
    if found != expected:
        raise ModelError(
            f"{folder}: {part} is not the one config.json names (hash {found[:12]}, not {expected[:12]}): "
            "the model directory is damaged or was put together from different models"
        )


def copy_model(folder: Path, out: Path | str) -> Path:
    """Copy the model directory to the new folder `out`; returns it. Raises `DataError` when `out` is in use."""
    config = read_model_config(folder)
    with new_folder(Path(out)) as building:
        pictures = [file.name for file in folder.glob("*.png")]  # of the model card
        for file in ("config.json", "README.md", *pictures):
            if (folder / file).is_file():
                shutil.copyfile(folder / file, building / file)
        for part in config.parts.values():
            copy_part(folder / part.path, building / part.path)
    return Path(out)


def assemble_model(
    tokenizer: Path | str,
    generator: Path | str,
    text_model: Path | str,
    out: Path | str,
    *,
    name: str,
    image_size: int,
    styles: Sequence[str],
    languages: Sequence[str],
    default_sampling: SamplingOptions,
    card: str | None = None,
    optional: dict[str, Path] | None = None,
    describes: Literal["no", "tagged", "untagged"] = "no",
    answers: bool = False,
    selection: Selection | None = None,
    eight_bits: bool = False,
) -> Path:
    """Make the new model directory `out` of the folders and the file that training wrote; returns `out`.

    `optional` are folders of `OPTIONAL_PARTS`; `card` is the text of README.md. With `eight_bits` the generator's
    matrices are stored in 8 bits a number. Raises `ModelError` for a missing or
    broken part, for a generator that was trained with another tokenizer, another text model or other towers, and
    when `out` is in use.
    """
    parts = {"tokenizer": Path(tokenizer), "generator": Path(generator), "text": Path(text_model)}
    hashes = {part: stored_hash(Path(source)) for part, source in (optional or {}).items()}
    assert hashes.keys() <= set(OPTIONAL_PARTS)
    hashes |= check_parts(
        parts["tokenizer"], parts["generator"], parts["text"], hashes.get("towers"), (optional or {}).get("encoder")
    )
    parts |= {part: Path(source) for part, source in (optional or {}).items()}
    text_name = "text.json" if parts["text"].suffix == ".json" else "text.model"
    config = ModelConfig(
        name=name,
        image_size=image_size,
        styles=tuple(styles),
        languages=tuple(languages),
        default_sampling=default_sampling,
        parts={part: Part(text_name if part == "text" else part, hashes[part]) for part in parts},
        describes=describes,
        answers=answers,
        selection=selection or Selection(),
    )
    with new_folder(Path(out)) as building:
        for part, source in parts.items():
            copy_part(source, building / config.parts[part].path)
        if eight_bits:
            folder = building / config.parts["generator"].path
            pack_part(folder)
            config.parts["generator"] = Part("generator", content_hash(load_part(Transformer, folder)))
        write_model_config(building, config, card)
    return Path(out)


def write_model_config(folder: Path, config: ModelConfig, card: str | None = None) -> None:
    """Write `config.json` and the model card, README.md."""
    record: dict[str, Any] = {"format": FORMAT, **to_dict(config)}
    text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(card or f"# {config.name}\n", encoding="utf-8")


def check_parts(
    tokenizer: Path, generator: Path, text_model: Path, towers_hash: str | None = None, encoder: Path | None = None
) -> dict[str, str]:
    """Load the three parts, see that they belong together, and return their content hashes by name.

    `towers_hash` is that of the towers beside them and `encoder` the folder of the prompts' encoder, if there are any.
    """
    loaded = load_part(Transformer, generator)
    hashes = {
        "tokenizer": content_hash(load_image_tokenizer(tokenizer)),
        "generator": content_hash(loaded),
        "text": load_model_text(text_model).content_hash,
    }
    check_pairing(loaded.config.tokenizer_hash, loaded.config.text_hash, hashes)
    check_prompt_towers(loaded.config.prompt_features, towers_hash)
    check_prompt_encoder(loaded.config.prefix_width, encoder)
    return hashes


def check_pairing(tokenizer_hash: str, text_hash: str, hashes: dict[str, str]) -> None:
    """`ModelError` unless the generator's own record of its tokenizer and text model agrees with `hashes`."""
    for named, part, what in ((tokenizer_hash, "tokenizer", "image tokenizer"), (text_hash, "text", "text model")):
        if named != hashes[part]:
            raise ModelError(
                f"the generator was trained with the {what} {named[:12] or '(none named)'}, "
                f"not with this one ({hashes[part][:12]}): put the right {part} beside it"
            )


def check_prompt_towers(features: PromptFeatures, towers_hash: str | None) -> None:
    """`ModelError` unless the towers with that hash are those whose vectors the generator reads, if it reads any."""
    if features.used and towers_hash != features.towers_hash:
        found = f"not of these ({towers_hash[:12]})" if towers_hash else "and there are none"
        raise ModelError(
            f"the generator reads vectors of the towers {features.towers_hash[:12]}, {found}: put the towers beside it "
            "that it was trained with (mmwudao assemble --towers)"
        )


def check_prompt_encoder(prefix_width: int, folder: Path | None) -> None:
    """`ModelError` unless the encoder in `folder` makes the vectors that the generator reads, if it reads any."""
    found = read_encoder_config(folder).width if folder is not None else 0
    if found != prefix_width:
        raise ModelError(
            f"the generator reads vectors of {prefix_width} numbers for a prompt, and the encoder beside it makes "
            f"{found or 'none'}: put the encoder beside it that it was imported with"
        )


def copy_part(source: Path, target: Path) -> None:
    """Copy a part, a folder or a file, to its new place."""
    if source.is_dir():
        target.mkdir(parents=True)
        for file in source.iterdir():
            # a part may bring files of its own, such as a tower's text model
            if file.is_file() and not file.name.startswith("."):
                shutil.copyfile(file, target / file.name)
    else:
        shutil.copyfile(source, target)
