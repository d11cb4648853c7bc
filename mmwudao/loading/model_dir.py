"""Model directories: where they are found, what they hold, and how training's outputs become one.

    config.json                       `ModelConfig`: the picture size, the styles, the sampling defaults, the parts
    tokenizer/, generator/            config.json + model.safetensors each
    text.model                        SentencePiece
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
from data.text import TextTokenizer
from generation.drawing.sampling import SamplingOptions
from generation.transformer.model import Transformer
from vqvae.model import VQVAE
from vqvae.storage.parts import ModelError, content_hash, load_part, stored_hash

FORMAT = "mmwudao-model/1"
SHIPPED = Path(__file__).parents[1] / "models"
PART_NAMES = ("tokenizer", "generator", "text")  # what draws
OPTIONAL_PARTS = ("upscaler", "towers")
PART_FILES = ("config.json", "model.safetensors")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Part:
    """A part's place inside the model directory and the SHA-256 of its content."""

    path: str
    hash: str


@dataclass(frozen=True)
class ModelConfig:
    """`config.json` of a model directory. `image_size` in pixels, a side.

    `describes`: whether the generator also tells what a picture shows, after the language's tag (see
    `data.styles.tagged`) or, as CogView's, without one.
    """

    name: str
    image_size: int
    styles: tuple[str, ...]
    languages: tuple[str, ...]
    default_sampling: SamplingOptions
    parts: dict[str, Part]
    describes: Literal["no", "tagged", "untagged"] = "no"

    @property
    def model_hash(self) -> str:
        """One SHA-256 over the hashes of the parts that draw: what a picture remembers its model by."""
        lines = (f"{name} {part.hash}\n" for name, part in sorted(self.parts.items()) if name in PART_NAMES)
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
    patterns = ["config.json", "README.md", "*.png", "text.model", *(f"*/{file}" for file in PART_FILES)]
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
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ModelError(f"{path} does not describe a model: its \"format\" must be {FORMAT!r}")
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


def load_tokenizer(model: str | Path) -> VQVAE:
    """The image tokenizer of a model, or of a folder that holds a trained tokenizer alone. Raises `ModelError`."""
    if (Path(model) / "model.safetensors").exists():
        return load_part(VQVAE, model)
    folder = find_model(model)
    part = read_model_config(folder).parts["tokenizer"]
    tokenizer = load_part(VQVAE, folder / part.path)
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
            _copy_part(folder / part.path, building / part.path)
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
) -> Path:
    """Make the new model directory `out` of the folders and the file that training wrote; returns `out`.

    `optional` are folders of `OPTIONAL_PARTS`; `card` is the text of README.md. Raises `ModelError` for a missing or
    broken part, for a generator that was trained with another tokenizer or another text model, and when `out` is in
    use.
    """
    parts = {"tokenizer": Path(tokenizer), "generator": Path(generator), "text": Path(text_model)}
    hashes = check_parts(parts["tokenizer"], parts["generator"], parts["text"])
    for part, source in (optional or {}).items():
        assert part in OPTIONAL_PARTS, part
        parts[part], hashes[part] = Path(source), stored_hash(Path(source))
    config = ModelConfig(
        name=name,
        image_size=image_size,
        styles=tuple(styles),
        languages=tuple(languages),
        default_sampling=default_sampling,
        parts={part: Part("text.model" if part == "text" else part, hashes[part]) for part in parts},
        describes=describes,
    )
    with new_folder(Path(out)) as building:
        for part, source in parts.items():
            _copy_part(source, building / config.parts[part].path)
        write_model_config(building, config, card)
    return Path(out)


def write_model_config(folder: Path, config: ModelConfig, card: str | None = None) -> None:
    """Write `config.json` and the model card, README.md."""
    record: dict[str, Any] = {"format": FORMAT, **to_dict(config)}
    text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(card or f"# {config.name}\n", encoding="utf-8")


def check_parts(tokenizer: Path, generator: Path, text_model: Path) -> dict[str, str]:
    """Load the three parts, see that they belong together, and return their content hashes by name."""
    loaded = load_part(Transformer, generator)
    hashes = {
        "tokenizer": content_hash(load_part(VQVAE, tokenizer)),
        "generator": content_hash(loaded),
        "text": TextTokenizer(text_model, needs_bytes=False).content_hash,
    }
    check_pairing(loaded.config.tokenizer_hash, loaded.config.text_hash, hashes)
    return hashes


def check_pairing(tokenizer_hash: str, text_hash: str, hashes: dict[str, str]) -> None:
    """`ModelError` unless the generator's own record of its tokenizer and text model agrees with `hashes`."""
    for named, part, what in ((tokenizer_hash, "tokenizer", "image tokenizer"), (text_hash, "text", "text model")):
        if named != hashes[part]:
            raise ModelError(
                f"the generator was trained with the {what} {named[:12] or '(none named)'}, "
                f"not with this one ({hashes[part][:12]}): put the right {part} beside it"
            )


def _copy_part(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir(parents=True)
        for file in source.iterdir():
            # a part may bring files of its own, such as a tower's text model
            if file.is_file() and not file.name.startswith("."):
                shutil.copyfile(file, target / file.name)
    else:
        shutil.copyfile(source, target)
