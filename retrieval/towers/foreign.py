"""Configurations of other projects: read, and every number of them checked, before anything is built from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm

from data.characters import decode_text
from data.records import parse_json
from vqvae.storage.parts import ModelError

MOST_BYTES = 1 << 20  # of a file of settings
MOST_VALUES = 10_000  # in one, counted as often as they are referred to
MOST_NUMBER = 2**31
SIZE, COUNT, SHARE = (1, 65536), (1, 256), (0, 0.999)
# limits of what is called so in configurations of open_clip, timm and Hugging Face, whole numbers where both are whole
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        ["embed_dim", "width", "head_width", "hidden_size", "intermediate_size", "embedding_size", "d_model", "d_ff",
         "d_kv", "dim", "hidden_dim", "head_dim", "context_length", "max_position_embeddings", "n_positions",
         "n_queries", "attn_pooler_queries", "num_features", "stem_size", "projection_dim", "project_dim",
         "projection_size", "num_patches", "num_channels"], SIZE,
    ),
    **dict.fromkeys(
        ["layers", "heads", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_layers",
         "num_decoder_layers", "num_heads", "n_layers", "n_heads", "n_layer", "n_head", "attn_pooler_heads", "depth",
         "depths", "type_vocab_size"], COUNT,
    ),
    **dict.fromkeys(["image_size", "img_size"], (8, 4096)),
    "patch_size": (1, 512),
    "vocab_size": (2, 2_000_000),
    **dict.fromkeys(["mlp_ratio", "depth_multiplier", "channel_multiplier"], (0.01, 16.0)),
    **dict.fromkeys(["patch_dropout", "timm_drop", "timm_drop_path", "drop_rate", "drop_path_rate",
                     "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"], SHARE),
    **dict.fromkeys(["layer_norm_eps", "bn_eps", "norm_eps", "eps"], (1e-30, 1.0)),
    "mean": (0.0, 1.0),  # of a channel, where white is 1
    "std": (1e-6, 1000.0),
}  # fmt: skip
# what timm would read weights with, or fetch them
TRUNK_REFUSED = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "num_classes",
)


def read_record(path: Path, parse: Callable[[str], Any], kind: str, most: int = MOST_BYTES) -> dict[str, Any]:
    """The dictionary in a file of settings. Raises `ModelError`; `kind` says what should be there."""
    try:
        if path.stat().st_size > most:
            raise ModelError(f"{path} is refused: such a file has at most {most} bytes")
        record = parse(decode_text(path.read_bytes()))
    except ModelError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} is missing or not {kind} ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(record, dict):
        raise ModelError(f"{path} is missing or not {kind} (it holds a {type(record).__name__})")
    return record


def read_json_object(path: Path, kind: str = "a JSON object") -> dict[str, Any]:
    """A JSON object, its numbers checked (`check_numbers`). Raises `ModelError`."""
    record = read_record(path, parse_json, kind)
    check_numbers(record, path)
    return record


def check_text_files(folder: Path) -> None:
    """Raise `ModelError` for a text tower's settings that name a program, or have a number out of its limits."""
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        # the numbers of a tokenizer are no sizes: 10^30 stands for "of any length"
        tokenizer = name == "tokenizer_config.json"
        record = (
            read_record(path, parse_json, "a JSON object", 64 * MOST_BYTES) if tokenizer else read_json_object(path)
        )
        if "auto_map" in record:
            raise ModelError(f"{path} names a program (auto_map), and none is run: import towers without one")


def check_numbers(record: dict[str, Any], path: Path | str) -> None:
    """Check every number of a foreign configuration: finite, and within `LIMITS` where its name is known.

    Raises `ModelError` that names the number, its limits and the file.
    """
    budget = iter(range(MOST_VALUES))

    def look(name: str, value: Any, place: str) -> None:
        if next(budget, None) is None:
            raise ModelError(f"{path} is refused: settings have at most {MOST_VALUES} values")
        if name in LIMITS and (value == [] or isinstance(value, dict)):
            raise ModelError(f"{path}: {place} must be a number, not {str(value)[:60]!r}")
        if isinstance(value, dict):
            for key, inner in value.items():
                look(str(key)[:60], inner, f"{place}.{str(key)[:60]}".lstrip("."))
        elif isinstance(value, list | tuple):
            for inner in value:
                look(name, inner, place)
        elif name in LIMITS and not isinstance(value, int | float | None):
            raise ModelError(f"{path}: {place} must be a number, not {str(value)[:60]!r}")
        elif name in LIMITS or isinstance(value, int | float):
            _check_number(name, value, f"{path}: {place}")

    look("", record, "")


def _check_number(name: str, value: Any, where: str) -> None:
    least, most = LIMITS.get(name, (-MOST_NUMBER, MOST_NUMBER))
    if value is None or (isinstance(value, bool) and name not in LIMITS):
        return
    whole = name in LIMITS and isinstance(least, int) and isinstance(most, int)
    wrong = isinstance(value, bool) or (isinstance(value, float) and (whole or not math.isfinite(value)))
    if wrong or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise ModelError(f"{where} must be {kind} from {least} to {most}, not {str(value)[:60]}")


def check_trunk(name: str, options: dict[str, Any]) -> None:
    """Raise `ModelError` for a trunk that timm does not have itself, or options that read or fetch weights."""
    if not timm.is_model(name):
        raise ModelError(f"no towers can be built from this configuration (Unknown model {name[:80]!r}: not of timm)")
    if refused := sorted(set(options) & set(TRUNK_REFUSED)):
        raise ModelError(
            f"the options of the trunk may not hold {', '.join(refused)}: weights come from the checkpoint"
        )
    check_numbers(options, "the options of the trunk")


def check_open_clip(model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any]) -> None:
    """Check the sections of an open_clip_config.json. Raises `ModelError`."""
    check_numbers(model_cfg, "model_cfg")
    check_numbers(preprocess_cfg, "preprocess_cfg")
    for name in ("vision_cfg", "text_cfg"):
        if not isinstance(model_cfg.get(name), dict):
            raise ModelError(f"no towers can be built from this configuration (it has no section {name})")
    if trunk := model_cfg["vision_cfg"].get("timm_model_name"):
        check_trunk(str(trunk), {})
    for name in ("mean", "std"):
        values = preprocess_cfg.get(name)
        three = isinstance(values, list | tuple) and [type(value) in (int, float) for value in values] == [True] * 3
        if values is not None and not three:
            raise ModelError(f"preprocess_cfg: {name} must be three numbers, not {str(values)[:60]}")


@contextmanager
def without_network() -> Iterator[None]:
    """Inside, the hub's client fetches nothing and raises `OSError`, whatever a configuration names."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
