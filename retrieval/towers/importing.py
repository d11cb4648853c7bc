"""Converts published retrieval models to folders of towers, without executing their files and key by key."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import open_clip
import torch
from torch import Tensor

from data.atomic import check_unused
from data.config import from_dict
from data.options import SIDE, check_options, option
from data.records import parse_yaml
from retrieval.towers.base import Towers, save_towers
from retrieval.towers.brivl import BertSizes, BrivlConfig, BrivlTowers
from retrieval.towers.chinese_clip import ChineseClipTowers, halved_names, read_published_config, resize_positions
from retrieval.towers.chinese_clip_config import known_model
from retrieval.towers.foreign import check_numbers, check_text_files, read_json_object, read_record, without_network
from retrieval.towers.hub_settings import (
    TOKENIZER_FILES,
    TOWER_TYPES,
    read_hub_config,
    read_picture_rules,
)
from retrieval.towers.hub_towers import SETTINGS_HASH, TransformersTowers, choose_text_rules, hub_keys
from retrieval.towers.open_clip import TEXT_CONFIG, OpenClipTowers
from retrieval.towers.settings import TransformersImport
from vqvae.storage.folders import read_weights_file, read_weights_folder
from vqvae.storage.parts import ModelError
from vqvae.storage.published import check_tensors, read_checkpoint, section

T = TypeVar("T", bound=Towers)

# our names of BriVL's parts -> the published ones
BRIVL_PARTS = {
    "image.backbone.": "imgencoder.backbone.",
    "image.project.": "imgencoder.learnable.max_pool.0.",
    "image.pool.attention.": "imgencoder.learnable.imgAtt.",
    "image.head.": "imgencoder.learnable.imgFC.",
    "text.backbone.": "textencoder.backbone.bert.",
    "text.pool.attention.": "textencoder.learnable.textAtt.",
    "text.head.": "textencoder.learnable.textFC.",
}
# parts of the published file that no feature depends on, and the momentum copies of training
BRIVL_UNUSED = re.compile(
    r"(img|text)encoder_mom\.|imgencoder\.backbone\.classifier\.|textencoder\.backbone\.bert\.pooler\.|.*\.position_ids$"
)

BRIVL_SIZES = {
    "cnn": "CNN",
    "cnn_options": "CNN_OPTIONS",
    "image_size": "IMG_SIZE",
    "image_width": "IMG_FEATURE_DIM",
    "image_heads": "IMG_TRANSFORMER_HEAD",
    "image_layers": "IMG_TRANSFORMER_LAYER",
    "box_slots": "MAX_IMG_LEN",
    "grid_size": "GRID_SIZE",
    "text_heads": "TEXT_TRANSFORMER_HEAD",
    "text_layers": "TEXT_TRANSFORMER_LAYER",
    "text_tokens": "MAX_TEXT_LEN",
    "temperature": "TEMPERATURE",
}

POSITIONS = "visual.positional_embedding"
PREPROCESS = ("mean", "std", "interpolation", "resize_mode")
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors",
    "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pt", "pytorch_model.bin",
)  # fmt: skip


@dataclass(frozen=True)
class ChineseClipImport:
    """How a Chinese-CLIP checkpoint is read."""

    model: str = "ViT-B-16"  # one of `PUBLISHED`, whose sizes are used
    configs: tuple[Path, Path] | None = None  # the original's JSON files (vision, text), for sizes of one's own
    vocab: Path | None = None  # vocab.txt of the text tower; by default the one beside the checkpoint
    image_size: int | None = option(
        None, "Resize a ViT's position embedding to pictures of this many pixels, as the original's `load` does.",
        least=1, most=SIDE,
    )  # fmt: skip
    rounded: bool = False  # rounds most weights to half precision, as the original's `load_from_name` does

    def __post_init__(self) -> None:
        check_options(self)


def import_chinese_clip(source: Path, out: Path, settings: ChineseClipImport) -> Path:
    """Convert a Chinese-CLIP checkpoint to the new folder of towers `out`.

    Raises `ModelError` that says what is missing, damaged, unsafe or does not fit; `out` is then not created.
    """
    configs, image_size = settings.configs, settings.image_size
    config = known_model(settings.model) if configs is None else read_published_config(*configs)
    weights = _weights(read_checkpoint(source), source)
    pieces = _vocab(settings.vocab or source.parent / "vocab.txt")
    towers = _built(lambda: ChineseClipTowers(config, pieces))
    tensors = _checked(weights, {name: name for name in towers.state_dict()}, towers, source)
    if image_size is not None:
        if config.patch_size is None or image_size < 1 or image_size % config.patch_size:
            raise ModelError(f"only a ViT takes another image size, a multiple of its patch size, not {image_size}")
        tensors[POSITIONS] = resize_positions(tensors[POSITIONS].float(), image_size // config.patch_size)
        towers = _built(lambda: ChineseClipTowers(replace(config, image_size=image_size), pieces))
    if settings.rounded:
        tensors |= {name: tensors[name].half().float() for name in halved_names(towers)}
    return _save(towers, tensors, out)


def import_brivl(source: Path, out: Path, *, text_model: Path, config: Path | None = None) -> Path:
    """Convert BriVL 1.0's checkpoint to the new folder of towers `out`.

    `text_model` is a folder with the vocab.txt of hfl/chinese-roberta-wwm-ext, and its config.json if the sizes differ.
    `config` is a YAML file in the layout of the original's cfg/test_xyb.yml, which is the default; a key CNN_OPTIONS
    under MODEL goes to timm. Raises `ModelError` as `import_chinese_clip` does.
    """
    sizes = _brivl_config(config, text_model / "config.json")
    weights = section(read_checkpoint(source), "learnable", source)
    weights = {key: value for key, value in weights.items() if not BRIVL_UNUSED.match(str(key))}
    towers = _built(lambda: BrivlTowers(sizes, _vocab(text_model / "vocab.txt")))
    return _save(towers, _checked(weights, brivl_keys(towers), towers, source), out)


def brivl_keys(towers: BrivlTowers) -> dict[str, str]:
    """Our name of each tensor -> its published name (without "_mom")."""
    return {
        name: theirs + name.removeprefix(ours)
        for name in towers.state_dict()
        for ours, theirs in BRIVL_PARTS.items()
        if name.startswith(ours)
    }


def import_open_clip(
    source: Path, out: Path, *, model: str | None = None, tag: str | None = None, text_model: Path | None = None
) -> Path:
    """Convert open_clip weights to the new folder of towers `out`.

    `source` is a folder with open_clip_config.json and weights, or a file of weights of the open_clip model `model`,
    whose pictures are prepared as for the published `tag`, if one is given. `text_model` is the folder with config.json
    and tokenizer files of a Hugging Face text tower, by default `source`. Raises `ModelError` as `import_chinese_clip`
    does.
    """
    model_cfg, preprocess_cfg = _open_clip_config(source, model, tag)
    file = source
    if source.is_dir():
        file = next((source / name for name in OPEN_CLIP_WEIGHTS if (source / name).is_file()), source)
        if file == source:
            raise ModelError(f"{source} has no weights: none of {', '.join(OPEN_CLIP_WEIGHTS)}")
    with tempfile.TemporaryDirectory() as name:
        text = Path(name)
        _copy_text_files(text_model or (source if source.is_dir() else source.parent), text)
        towers = _built(lambda: OpenClipTowers(model_cfg, preprocess_cfg, text))
    weights = _weights(read_weights_file(file), file)
    keys = {name: name.removeprefix("model.") for name in towers.state_dict()}
    return _save(towers, _checked(weights, keys, towers, file), out)


def import_transformers(source: Path, out: Path, settings: TransformersImport | None = None) -> Path:
    """Convert a folder in the layout of Hugging Face's transformers to the new folder of towers `out`.

    It holds config.json of a type of `TOWER_TYPES`, preprocessor_config.json, the files of a tokenizer, and weights as
    `read_weights_folder` reads them. No program in it is run. Raises `ModelError` as `import_chinese_clip` does.
    """
    check_unused(out)
    config = read_hub_config(source)
    pictures = read_picture_rules(source, TOWER_TYPES[config["model_type"]])
    found = read_weights_folder(source)
    with tempfile.TemporaryDirectory() as name:
        text = Path(name)
        for known in TOKENIZER_FILES:
            if (source / known).is_file():
                shutil.copyfile(source / known, text / known)
        (text / "config.json").write_text(json.dumps(config), encoding="utf-8")

        def build() -> TransformersTowers:
            rules = choose_text_rules(config, text, settings or TransformersImport())
            return TransformersTowers(config, pictures, rules, text)

        towers = _built(build, "cpu")
    weights = _weights(found, source)
    keys = hub_keys(
        (name for name in towers.state_dict() if name != SETTINGS_HASH), (f"model.{key}" for key in weights)
    )
    tensors = _checked(weights, {name: key.removeprefix("model.") for name, key in keys.items()}, towers, source)
    return _save(towers, {**tensors, SETTINGS_HASH: towers.settings_hash}, out)


def _built(build: Callable[[], T], device: str = "meta") -> T:
    """Build towers (on the meta device: names and shapes, no memory), to be given weights. Raises `ModelError`."""
    try:
        with torch.device(device), without_network():
            return build()
    except ModelError:
        raise
    except Exception as error:  # timm, open_clip and transformers raise whatever their settings lead to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"no towers can be built from this configuration ({reason[:300]})") from error


def _weights(content: dict[Any, Any], path: Path) -> dict[Any, Any]:
    """The tensors of a checkpoint or weights file, without DDP's prefix and without unused ones."""
    weights = content["state_dict"] if isinstance(content.get("state_dict"), dict) else content
    kept = {
        key: value
        for key, value in weights.items()
        # buffers of older versions of transformers
        if not (isinstance(key, str) and re.search(r"\bbert\.pooler\.|\.position_ids$", key))
    }
    named = {key.removeprefix("module.") if isinstance(key, str) else key: value for key, value in kept.items()}
    if len(named) < len(kept):
        raise ModelError(f"{path} has tensors twice: with and without the prefix 'module.'")
    return named


def _checked(weights: Mapping[Any, Any], keys: Mapping[str, str], towers: Towers, path: Path) -> dict[str, Tensor]:
    """Our name -> tensor. Raises `ModelError` as `check_tensors` does."""
    wanted = {name: tensor for name, tensor in towers.state_dict().items() if name in keys}
    shapes = {keys[name]: tuple(tensor.shape) for name, tensor in wanted.items()}
    whole = {keys[name] for name, tensor in wanted.items() if not tensor.is_floating_point()}
    check_tensors(weights, shapes, path, whole=whole)
    return {name: weights[key] for name, key in keys.items()}


def _save(towers: Towers, tensors: Mapping[str, Tensor], out: Path) -> Path:
    check_unused(out)
    towers.load_state_dict(tensors, assign=True)
    return save_towers(towers, out, torch.float32)


def _brivl_config(path: Path | None, bert: Path) -> BrivlConfig:
    """The published sizes, overridden by the original's YAML file and by BERT's config.json."""
    sizes: dict[str, Any] = {}
    if bert.is_file():
        record = read_json_object(bert)
        sizes["bert"] = {size.name: record[size.name] for size in fields(BertSizes) if size.name in record}
    if path is not None:
        model = read_record(path, parse_yaml, "YAML with a section MODEL").get("MODEL")
        if not isinstance(model, dict):
            raise ModelError(f"{path} is missing or not YAML with a section MODEL (it has no such section)")
        sizes |= {ours: model[theirs] for ours, theirs in BRIVL_SIZES.items() if theirs in model}
        check_numbers(sizes, f"{path} does not describe BriVL")
    if "cnn" in sizes:  # timm's present name: "_ns" meant the training method
        sizes["cnn"] = str(sizes["cnn"]).removesuffix("_ns")
    try:
        return from_dict(BrivlConfig, sizes)
    except ValueError as error:
        raise ModelError(f"{path or bert} does not describe BriVL: {error}") from error


def _open_clip_config(source: Path, model: str | None, tag: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    if source.is_dir():
        record = read_json_object(source / "open_clip_config.json", "JSON")
        sections = {"model_cfg": record.get("model_cfg"), "preprocess_cfg": record.get("preprocess_cfg", {})}
        found = {name: value for name, value in sections.items() if isinstance(value, dict)}
        if missing := sections.keys() - found.keys():
            raise ModelError(f"{source / 'open_clip_config.json'} has no section {', '.join(sorted(missing))}")
        return found["model_cfg"], found["preprocess_cfg"]
    if model is None:
        raise ModelError(f"{source} is not a folder with open_clip_config.json: name its model (--model)")
    model_cfg = open_clip.get_model_config(model)
    if model_cfg is None:
        raise ModelError(f"open_clip knows no model {model!r}; open_clip.list_models() lists them")
    if tag is None:
        return model_cfg, {}
    published = open_clip.get_pretrained_cfg(model, tag)
    if not published:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
        raise ModelError(f"open_clip knows no weights {tag!r} of {model}; known: {tags or 'none'}")
    preprocess = {key: published[key] for key in PREPROCESS if key in published}
    return model_cfg | {"quick_gelu": bool(published.get("quick_gelu"))}, preprocess


def _copy_text_files(source: Path, target: Path) -> None:
    check_text_files(source)
    names = {"config.json": TEXT_CONFIG, **{name: name for name in TOKENIZER_FILES}}
    for name, ours in names.items():
        if (source / name).is_file():
            shutil.copyfile(source / name, target / ours)


def _vocab(path: Path) -> bytes:
    if not path.is_file():
        raise ModelError(f"no vocabulary at {path}: it comes with the text tower on its hub page")
    return path.read_bytes()
