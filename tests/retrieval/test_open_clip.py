"""open_clip's models behind our interface, compared with open_clip itself on random weights."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data.config import ConfigError
from data.text import TextTokenizer
from mmwudao.cli.app import run
from retrieval.towers.base import load_towers, save_towers
from retrieval.towers.importing import import_open_clip
from retrieval.towers.open_clip import OpenClipTowers
from vqvae.storage.parts import ModelError

TEXTS = ["a red apple", "", "红心", "a very long text " * 40]
VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "resnet": {
        "embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": TEXT,
    },
    "timm": {
        "embed_dim": 16, "custom_text": True, "text_cfg": TEXT,
        "vision_cfg": {"timm_model_name": "test_efficientnet", "timm_model_pretrained": True, "timm_pool": "avg",
                       "timm_proj": "linear", "image_size": 32},
    },
    "coca": {
        "embed_dim": 16, "custom_text": True,
        "vision_cfg": VISION | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
}  # fmt: skip
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear", "resize_mode": "squash"}


def pictures() -> list[Image.Image]:
    gradient = Image.radial_gradient("L").resize((70, 40))
    return [Image.merge("RGB", [gradient, gradient.transpose(Image.Transpose.FLIP_LEFT_RIGHT), gradient]), gradient]


def write_source(folder: Path, config: dict[str, Any]) -> Any:
    """A folder as open_clip publishes them, with random weights; returns the model of open_clip itself."""
    folder.mkdir()
    record = {"model_cfg": config, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    torch.manual_seed(1)
    options = {"load_weights": False, "pretrained_text": False, "pretrained_image": False}
    model = open_clip.create_model(f"local-dir:{folder}", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return model.eval()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_features_are_those_of_open_clip(tmp_path, name):
    source = tmp_path / "source"
    model = write_source(source, copy.deepcopy(CONFIGS[name]))
    towers = load_towers(import_open_clip(source, tmp_path / "towers"))
    _, transform = open_clip.create_model_from_pretrained(f"local-dir:{source}")
    pixels = torch.stack([transform(picture) for picture in pictures()])
    assert torch.equal(torch.stack([towers.preprocess(picture) for picture in pictures()]), pixels)
    tokens = open_clip.get_tokenizer(f"local-dir:{source}")(TEXTS)
    torch.testing.assert_close(towers.tokenize(TEXTS), tokens, atol=0, rtol=0)
    with torch.no_grad():
        images = model.encode_image(pixels, normalize=True)
        texts = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(towers.encode_image(pictures()), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(towers.encode_text(TEXTS), texts, atol=1e-5, rtol=0)
    torch.testing.assert_close(towers.scale, model.logit_scale.exp())
    assert towers.embed_dim == images.shape[1] == 16
    assert towers.image_size == 32
    torch.testing.assert_close(towers.normalise(torch.full((3, 2, 2), 0.75)), torch.ones(3, 2, 2))


def test_cut_texts_are_counted(tmp_path, caplog):
    write_source(tmp_path / "source", CONFIGS["clip"])
    towers = load_towers(import_open_clip(tmp_path / "source", tmp_path / "towers"))
    with caplog.at_level(logging.WARNING):
        towers.tokenize(["red " * 22, "\ud800"])
        assert "were cut" not in caplog.text
        towers.tokenize(["red " * 23, "red " * 50_000, "red"])
    assert "2 of 3 texts are longer than 24 tokens and were cut" in caplog.text


def test_a_hugging_face_text_tower(tmp_path):
    """Its sizes and its tokenizer come from a local folder."""
    from transformers import BertConfig, BertTokenizer

    local = tmp_path / "bert"
    BertConfig(
        vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    ).save_pretrained(local)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "apple", "##s", "a"]
    BertTokenizer({word: index for index, word in enumerate(words)}).save_pretrained(local)
    text = {"hf_model_name": str(local), "hf_tokenizer_name": str(local), "context_length": 12}
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text | {"hf_pooler_type": "mean_pooler"}}
    model = write_source(tmp_path / "source", copy.deepcopy(config))
    with pytest.raises(ModelError, match="whose config.json and tokenizer are needed"):
        import_open_clip(tmp_path / "source", tmp_path / "no")
    out = import_open_clip(tmp_path / "source", tmp_path / "towers", text_model=local)
    local.rename(tmp_path / "gone")
    towers = load_towers(out)
    ids = towers.tokenize(["red apples", "a"])
    assert isinstance(ids, torch.Tensor)
    assert torch.equal(ids[:, :5], torch.tensor([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]]))
    with torch.no_grad():
        expected = model.encode_text(ids, normalize=True)
    torch.testing.assert_close(towers.encode_text(["red apples", "a"]), expected, atol=1e-5, rtol=0)


def test_a_file_of_weights_by_the_name_of_its_model(tmp_path, monkeypatch, capsys):
    """As training saves them: a prefix, other keys beside the weights."""
    model = write_source(tmp_path / "source", CONFIGS["clip"])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"tiny": CONFIGS["clip"]})
    weights = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": weights}, tmp_path / "epoch_1.pt")
    arguments = ["import", "open-clip", str(tmp_path / "epoch_1.pt"), "--out", str(tmp_path / "towers")]
    assert run([*arguments, "--model", "tiny"]) == 0
    towers = load_towers(tmp_path / "towers")
    assert isinstance(towers, OpenClipTowers)
    for name, tensor in model.state_dict().items():
        assert torch.equal(towers.model.state_dict()[name], tensor)
    assert run(arguments) == 2
    assert run([*arguments, "--model", "absent"]) == 2
    assert run([*arguments, "--model", "tiny", "--tag", "absent"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert ["name its model" in errors[0], "knows no model" in errors[1], "no weights 'absent'" in errors[2]] == [
        True
    ] * 3
    assert len(errors) == 3


def test_published_tags_say_how_pictures_are_prepared(tmp_path):
    from retrieval.towers.importing import _open_clip_config

    model, preprocess = _open_clip_config(tmp_path / "weights.pt", "ViT-B-32", "openai")
    assert model["quick_gelu"] is True
    assert preprocess["mean"] == open_clip.OPENAI_DATASET_MEAN
    model, _ = _open_clip_config(tmp_path / "weights.pt", "ViT-B-32", "laion2b_s34b_b79k")
    assert model["quick_gelu"] is False


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "open_clip_config.json is missing or not JSON"),
        ("no section", "has no section model_cfg"),
        ("no weights", "has no weights"),
        ("truncated", "truncated or damaged"),
        ("missing", "missing: text_projection"),
        ("odd config", "no towers can be built from this configuration"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, capsys, kind, message):
    source = tmp_path / "source"
    model = write_source(source, CONFIGS["clip"])
    config, weights = source / "open_clip_config.json", source / "model.safetensors"
    if kind == "no config":
        config.unlink()
    elif kind == "no section":
        config.write_text("{}")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "missing":
        save_file({name: t for name, t in model.state_dict().items() if name != "text_projection"}, weights)
    else:
        config.write_text(json.dumps({"model_cfg": CONFIGS["clip"] | {"wheels": 4}}))
    assert run(["import", "open-clip", str(source), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.model"
    TextTokenizer.train(["a red apple", "红心", "a long text"] * 5, path, 300)
    return path


def test_a_named_architecture_starts_over_our_text_tokenizer(tmp_path, text_model):
    assert open_clip.create_model("mmwudao-small").visual.image_size in (112, (112, 112))
    towers = OpenClipTowers.from_scratch("mmwudao-small", text_model).eval()
    ids = towers.tokenize(["red apple", "", "long " * 100])
    end = towers.model_cfg["text_cfg"]["vocab_size"] - 1
    assert ids.shape == (3, 48)
    assert (ids.amax(dim=1) == end).all()
    assert (ids[:, 0] == end - 1).all()
    assert ids[1].tolist()[:3] == [end - 1, end, 0]
    again = load_towers(save_towers(towers, tmp_path / "towers", torch.float32))
    torch.testing.assert_close(again.encode_text(TEXTS), towers.encode_text(TEXTS))
    assert again.encode_image(pictures()).shape == (2, 256)


def test_only_architectures_that_can_start_here_do(text_model):
    with pytest.raises(ConfigError, match="mmwudao-small"):
        OpenClipTowers.from_scratch("no-such-model", text_model)
    for name in ("xlm-roberta-base-ViT-B-32", "coca_ViT-B-32"):
        with pytest.raises(ConfigError, match="cannot be trained"):
            OpenClipTowers.from_scratch(name, text_model)
