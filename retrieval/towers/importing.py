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
import yaml
from torch import Tensor

from data.atomic import check_unused
from data.config import from_dict
from retrieval.towers.base import Towers, save_towers
from retrieval.towers.brivl import BertSizes, BrivlConfig, BrivlTowers
from retrieval.towers.chinese_clip import (
    PUBLISHED,
    ChineseClipTowers,
    halved_names,
    read_published_config,
    resize_positions,
)
from retrieval.towers.open_clip import TEXT_CONFIG, TOKENIZER_FILES, OpenClipTowers
from vqvae.storage.parts import ModelError
from vqvae.storage.published import check_shapes, read_checkpoint

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
    image_size: int | None = None  # resizes a ViT's position embedding, as the original's `load` does
    rounded: bool = False  # rounds most weights to half precision, as the original's `load_from_name` does


def import_chinese_clip(source: Path, out: Path, settings: ChineseClipImport) -> Path:
    """Convert a Chinese-CLIP checkpoint to the new folder of towers `out`.

    Raises `ModelError` that says what is missing, damaged, unsafe or does not fit; `out` is then not created.
    """
    configs, image_size = settings.configs, settings.image_size
    if configs is None and settings.model not in PUBLISHED:
        raise ModelError(f"no published Chinese-CLIP is called {settings.model!r}; known: {', '.join(PUBLISHED)}")
    config = PUBLISHED[settings.model] if configs is None else read_published_config(*configs)
    weights = _weights(read_checkpoint(source))
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
    weights = read_checkpoint(source).get("learnable")
    if not isinstance(weights, dict):
        raise ModelError(f"{source} has no weights under the key 'learnable'")
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
    weights = _weights(_tensors(file))
    keys = {name: name.removeprefix("model.") for name in towers.state_dict()}
    return _save(towers, _checked(weights, keys, towers, file), out)


def _built(build: Callable[[], T]) -> T:
    """Build towers on the meta device (names and shapes, no memory), to be given weights. Raises `ModelError`."""
    try:
        with torch.device("meta"):
            return build()
    except ModelError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"no towers can be built from this configuration ({reason[:300]})") from error


def _weights(content: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint or weights file, without DDP's prefix and without unused ones."""
    weights = content["state_dict"] if isinstance(content.get("state_dict"), dict) else content
    return {
        str(key).removeprefix("module."): value
        for key, value in weights.items()
        if not re.search(r"\bbert\.pooler\.|\.position_ids$", str(key))  # buffers of older versions of transformers
    }


def _checked(weights: Mapping[str, Any], keys: Mapping[str, str], towers: Towers, path: Path) -> dict[str, Tensor]:
    """Our name -> tensor. Raises `ModelError` that lists every tensor that is missing or does not fit."""
    shapes = {keys[name]: tuple(tensor.shape) for name, tensor in towers.state_dict().items()}
    check_shapes(weights, shapes, path)
    return {name: weights[key] for name, key in keys.items()}


def _save(towers: Towers, tensors: Mapping[str, Tensor], out: Path) -> Path:
    check_unused(out)
    towers.load_state_dict(tensors, assign=True)
    return save_towers(towers, out, torch.float32)


def _brivl_config(path: Path | None, bert: Path) -> BrivlConfig:
    """The published sizes, overridden by the original's YAML file and by BERT's config.json."""
    sizes: dict[str, Any] = {}
    if bert.is_file():
        record = _json(bert)
        sizes["bert"] = {size.name: record[size.name] for size in fields(BertSizes) if size.name in record}
    if path is not None:
        try:
            model = yaml.safe_load(path.read_text(encoding="utf-8"))["MODEL"]
            sizes |= {ours: model[theirs] for ours, theirs in BRIVL_SIZES.items() if theirs in model}
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{path} is missing or not YAML with a section MODEL ({reason})") from error
    if "cnn" in sizes:  # timm's present name: "_ns" meant the training method
        sizes["cnn"] = str(sizes["cnn"]).removesuffix("_ns")
    try:
        return from_dict(BrivlConfig, sizes)
    except ValueError as error:
        raise ModelError(f"{path or bert} does not describe BriVL: {error}") from error


def _open_clip_config(source: Path, model: str | None, tag: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    if source.is_dir():
        record = _json(source / "open_clip_config.json")
        if not isinstance(record.get("model_cfg"), dict):
            raise ModelError(f"{source / 'open_clip_config.json'} has no section model_cfg")
        return record["model_cfg"], record.get("preprocess_cfg", {})
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
    if (source / "config.json").is_file():
        shutil.copyfile(source / "config.json", target / TEXT_CONFIG)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _vocab(path: Path) -> bytes:
    if not path.is_file():
        raise ModelError(f"no vocabulary at {path}: it comes with the text tower on its hub page")
    return path.read_bytes()


def _tensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        return read_checkpoint(path)
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is missing, truncated or damaged ({error})") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is missing or not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return record
