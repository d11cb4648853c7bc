"""Small models in the layouts of other projects, with random weights, and how each is imported."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from bench.load import mutations
from generation.cogview.importing import generator_sources, import_generator
from generation.cogview.rows import cogview_config
from retrieval.towers.brivl import BertSizes, BrivlConfig, BrivlTowers
from retrieval.towers.chinese_clip import ChineseClipTowers, read_published_config
from retrieval.towers.importing import (
    BRIVL_SIZES,
    ChineseClipImport,
    brivl_keys,
    import_brivl,
    import_chinese_clip,
    import_open_clip,
)
from retrieval.towers.open_clip import OpenClipTowers
from vqvae.cogview import import_tokenizer, tokenizer_sources
from vqvae.model import VQVAEConfig
from vqvae.storage.published import Source

VOCAB = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh")
Numbers = list[tuple[str, ...]]


@dataclass
class Model:
    """A published model: its files, and how it is imported from a folder with them into a new folder."""

    name: str
    weights: dict[str, torch.Tensor]
    wrap: Callable[[dict[Any, Any]], Any]  # weights -> what is stored
    checkpoint: str  # its name in the folder
    convert: Callable[[Path, Path], Any]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # name of a file -> its content
    texts: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write all files into the new folder, undamaged."""
        folder.mkdir(parents=True)
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        for name, record in self.settings.items():
            self.write_settings(folder / name, record)
        self.write_weights(folder, dict(self.weights))

    def write_settings(self, path: Path, record: Any) -> None:
        text = yaml.safe_dump(record) if path.suffix == ".yml" else json.dumps(record)
        path.write_text(text, encoding="utf-8")

    def write_weights(self, folder: Path, weights: dict[Any, Any]) -> None:
        """Write the checkpoint, as safetensors if it is called so. Raises `ValueError` for what that cannot hold."""
        path = folder / self.checkpoint
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(weights, path)
        else:
            torch.save(self.wrap(weights), path)

    def damage(self, folder: Path, draw: random.Random) -> str:
        """Damage one of the written files; returns what was done."""
        path = folder / self.checkpoint
        chance = draw.random()
        if self.settings and chance < 0.3:
            return self.damage_settings(folder, draw)
        if path.suffix == ".safetensors" and chance < 0.6:
            return _damage_safetensors(path, draw)
        if path.suffix == ".safetensors" or chance < 0.65:
            weights = dict(self.weights)
            what = draw.choice(mutations.CONTENT)(draw, weights)
            try:
                self.write_weights(folder, weights)
            except (ValueError, TypeError, RuntimeError, AttributeError, KeyError):  # safetensors holds no such thing
                return _damage_safetensors(path, draw)
            return what
        data, what = draw.choice(mutations.FILE)(draw, path.read_bytes())
        path.write_bytes(data)
        return what

    def damage_settings(self, folder: Path, draw: random.Random) -> str:
        """One number of a configuration becomes one that is out of every range, or no number."""
        name = draw.choice([*self.settings])
        record = copy.deepcopy(self.settings[name])
        owner, key = draw.choice([*_numbers(record)])
        wrong: list[Any] = [
            -1,
            -(10**9),
            10**9,
            10**30,
            1e308,
            float("nan"),
            float("inf"),
            "many",
            [],
            {},
            "hf-hub:a/b",
        ]
        owner[key] = draw.choice(wrong)
        self.write_settings(folder / name, record)
        return f"{key} in the configuration is {owner[key]!r}"


def models() -> list[Model]:
    """All models; the same at each call."""
    torch.manual_seed(0)
    return [_cogview_tokenizer(), _cogview_generator(), _brivl(), _chinese_clip(), _open_clip(), _open_clip_file()]


def _numbers(record: Any) -> list[tuple[Any, Any]]:
    """(dictionary or list, key) of each number."""
    items = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    found = []
    for key, value in items:
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.append((record, key))
        found += _numbers(value)
    return found


def _random(sources: dict[str, Source]) -> dict[str, torch.Tensor]:
    return {source.key: torch.randn(source.shape) for source in sources.values()}


def _cogview_tokenizer() -> Model:
    weights = _random(tokenizer_sources(VQVAEConfig.cogview(channels=[8] * 3, code_dim=4, codebook_size=32)))
    prefixed = {f"module.{key}": value for key, value in weights.items()}
    return Model(
        "CogView's tokenizer",
        prefixed,
        dict,
        "vqvae.pt",
        lambda folder, out: import_tokenizer(folder / "vqvae.pt", out),
    )


def _cogview_generator() -> Model:
    sizes: dict[str, Any] = {"num_image_codes": 64, "num_text_pieces": 30}
    config = cogview_config(positions=80, width=16, depth=3, heads=2, grid=(8, 8), **sizes)

    def convert(folder: Path, out: Path) -> None:
        hashes: dict[str, Any] = {"tokenizer_hash": "t", "text_hash": "x"}
        import_generator(folder, out, **sizes, **hashes, grid=(8, 8), heads=2, layers=3)

    return Model(
        "CogView's generator", _random(generator_sources(config)), lambda weights: {"module": weights, "iteration": 7},
        "7/mp_rank_00_model_states.pt", convert, texts={"latest_checkpointed_iteration.txt": "7"},
    )  # fmt: skip


def _floats(tensors: dict[str, torch.Tensor], keys: dict[str, str]) -> dict[str, torch.Tensor]:
    """Random numbers for the names of our tensors, under the published keys."""
    return {
        keys[name]: torch.rand(tensor.shape) + 0.1 if tensor.is_floating_point() else torch.zeros_like(tensor)
        for name, tensor in tensors.items()
    }


def _brivl() -> Model:
    options = {"channel_multiplier": 0.25, "depth_multiplier": 1.0, "bn_eps": 0.001}
    bert = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
            "max_position_embeddings": 16, "type_vocab_size": 2, "vocab_size": 13}  # fmt: skip
    sizes: dict[str, Any] = {
        "cnn": "test_efficientnet", "cnn_options": options, "image_size": 64, "image_width": 64, "image_heads": 2,
        "image_layers": 1, "box_slots": 5, "grid_size": 2, "text_heads": 2, "text_layers": 1, "text_tokens": 12,
        "temperature": 0.07,
    }  # fmt: skip
    vocab = "\n".join(VOCAB) + "\n"
    towers = BrivlTowers(BrivlConfig(**sizes, bert=BertSizes(**bert)), vocab.encode())
    weights = _floats(towers.state_dict(), brivl_keys(towers))

    def convert(folder: Path, out: Path) -> None:
        import_brivl(folder / "brivl.pth", out, text_model=folder, config=folder / "cfg.yml")

    published = {BRIVL_SIZES[name]: value for name, value in sizes.items()}
    settings: dict[str, dict[str, Any]] = {"cfg.yml": {"MODEL": published}, "config.json": bert}
    wrap: Any = lambda weights: {"learnable": weights}  # noqa: E731
    return Model("BriVL", weights, wrap, "brivl.pth", convert, settings, {"vocab.txt": vocab})


def _chinese_clip() -> Model:
    vision = {"embed_dim": 8, "image_resolution": 16, "vision_layers": 2, "vision_width": 16, "vision_head_width": 8,
              "vision_patch_size": 8}  # fmt: skip
    text = {"vocab_size": 13, "text_max_position_embeddings": 64, "text_hidden_size": 8, "text_num_hidden_layers": 2,
            "text_num_attention_heads": 2, "text_intermediate_size": 16}  # fmt: skip
    vocab = "\n".join(VOCAB) + "\n"

    def convert(folder: Path, out: Path) -> None:
        configs = (folder / "vision.json", folder / "text.json")
        import_chinese_clip(folder / "clip.pt", out, ChineseClipImport(configs=configs))

    def wrap(weights: dict[Any, Any]) -> Any:
        prefixed = {f"module.{key}" if isinstance(key, str) else key: value for key, value in weights.items()}
        return {"epoch": 3, "state_dict": prefixed}

    settings = {"vision.json": vision, "text.json": text}
    model = Model("Chinese-CLIP", {}, wrap, "clip.pt", convert, settings, {"vocab.txt": vocab})
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        model.write(folder := Path(name) / "model")
        config = read_published_config(folder / "vision.json", folder / "text.json")
    tensors = ChineseClipTowers(config, vocab.encode()).state_dict()
    model.weights = _floats(tensors, {name: name for name in tensors})
    return model


def _open_clip_settings() -> dict[str, Any]:
    vision = {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2}
    pictures = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    return {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": pictures}


def _open_clip(file: str = "open_clip_pytorch_model.bin") -> Model:
    settings = _open_clip_settings()
    tensors = OpenClipTowers(settings["model_cfg"], settings["preprocess_cfg"], Path("nowhere")).model.state_dict()
    weights = _floats(tensors, {name: name for name in tensors})
    convert: Any = lambda folder, out: import_open_clip(folder, out)  # noqa: E731
    name = "OpenCLIP" if file.endswith(".bin") else "OpenCLIP, safetensors"
    return Model(name, weights, dict, file, convert, {"open_clip_config.json": settings})


_open_clip_file = partial(_open_clip, "open_clip_model.safetensors")


def _damage_safetensors(path: Path, draw: random.Random) -> str:
    """The header or the length. Flipped numbers are left out: the format has no checksums, so nothing could tell."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    if draw.random() < 0.4:
        path.write_bytes(data[: draw.randrange(len(data))])
        return "truncated"
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 4, 64])):
        changed[draw.randrange(length + 8)] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(changed))
    return "bits of the header are flipped"
