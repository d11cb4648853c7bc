"""Chinese-CLIP as published: features, word pieces, pictures, loss and import, against the original's outputs."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from PIL import Image

from mmwudao.cli.app import run
from retrieval.towers.base import load_towers
from retrieval.towers.chinese_clip import (
    ChineseClipTowers,
    halved_names,
    normalise_caption,
    read_published_config,
    resize_positions,
)
from retrieval.towers.chinese_clip_config import PUBLISHED
from retrieval.towers.importing import ChineseClipImport, import_chinese_clip
from retrieval.towers.word_pieces import WordPieces
from vqvae.storage.parts import ModelError

GOLDEN = Path(__file__).parents[1] / "golden" / "cnclip"
TOKENS = json.loads((GOLDEN / "tokens.json").read_text())
WORDS = "module.bert.embeddings.word_embeddings.weight"


def arrays(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file}


def configs(name: str) -> tuple[Path, Path]:
    folder = GOLDEN / "model_configs"
    return folder / f"tiny-{name}.json", folder / f"tiny-roberta-{name}.json"


def vocabulary() -> bytes:
    """21128 lines with the pieces of the golden texts in their places; the greedy match needs no others."""
    lines = [f"[unused{index}]" for index in range(21128)]
    lines[0], lines[100], lines[101], lines[102], lines[343] = "[PAD]", "[UNK]", "[CLS]", "[SEP]", ""
    free = iter(range(1, 100))
    for entry in TOKENS:
        ids = [index for index in entry["ids52"][1:] if index not in (0, 102)]
        for piece, index in zip(entry["tokens"], ids, strict=False):
            lines[index] = piece
    for piece in {piece for entry in TOKENS for piece in entry["tokens"]} - set(lines):
        lines[next(free)] = piece  # beyond the length that ids were kept for
    return ("\n".join(lines) + "\n").encode()


def checkpoint(name: str) -> dict[str, Any]:
    """The published layout."""
    weights = arrays(GOLDEN / name / "weights.npz")
    ids, rows = weights.pop("word_ids"), weights.pop("word_rows")
    weights[WORDS] = torch.zeros(21128, rows.shape[1])
    weights[WORDS][ids] = rows
    return {"epoch": 3, "step": 1234, "name": "golden", "state_dict": weights, "optimizer": {}}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    (folder / "vocab.txt").write_bytes(vocabulary())
    for name in ("vit", "rn"):
        torch.save(checkpoint(name), folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="module", params=["vit", "rn"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, published: Path) -> Path:
    settings = ChineseClipImport(configs=configs(name))
    return import_chinese_clip(published / f"{name}.pt", published / f"{name}-towers", settings)


def pictures() -> list[Image.Image]:
    return [Image.open(GOLDEN / "imgs" / f"img_{index}.png") for index in range(6)]


# features


def check_features(towers: Any, expected: dict[str, torch.Tensor], which: str) -> None:
    with torch.no_grad():
        found = {
            "image_raw": towers.raw_pixels(expected["images"]),
            "text_raw": towers.raw_tokens(expected["text_ids"]),
            "image_norm": towers.encode_pixels(expected["images"]),
            "text_norm": towers.encode_tokens(expected["text_ids"]),
            "logit_scale_exp": towers.scale,
        }
    for key, value in found.items():
        torch.testing.assert_close(value, expected[f"{which}/{key}"], atol=1e-5, rtol=0)


def test_features_with_exact_weights(name, folder):
    check_features(load_towers(folder), arrays(GOLDEN / name / "expected.npz"), "fp32")


def test_features_with_weights_as_the_public_loader_rounds_them(name, published, tmp_path):
    settings = ChineseClipImport(configs=configs(name), rounded=True)
    out = import_chinese_clip(published / f"{name}.pt", tmp_path / "out", settings)
    towers = load_towers(out)
    assert isinstance(towers, ChineseClipTowers)
    assert sorted(halved_names(towers)) == json.loads((GOLDEN / name / "halved.json").read_text())
    expected = arrays(GOLDEN / name / "expected.npz")
    check_features(towers, expected, "fp16weights")
    apart = (expected["fp16weights/text_norm"] - expected["fp32/text_norm"]).abs().max()
    assert apart > 1e-4, "the two must differ, or this tests nothing"


def test_pictures_are_resized_in_their_own_mode(name, folder):
    towers, expected = load_towers(folder), arrays(GOLDEN / name / "expected.npz")
    assert {picture.mode for picture in pictures()} == {"RGB", "L", "RGBA", "P"}
    grey_level = 1 / 255 / min(towers.pixel_std) + 1e-5
    for picture, pixels in zip(pictures(), expected["images"], strict=True):
        # the golden file is of Pillow 13, which resizes grey pictures with other rounding than Pillow 12
        atol = grey_level if picture.mode == "L" else 1e-5
        torch.testing.assert_close(towers.preprocess(picture), pixels, atol=atol, rtol=0)
    exact = [index for index, picture in enumerate(pictures()) if picture.mode != "L"]
    features = towers.encode_image([pictures()[index] for index in exact])
    torch.testing.assert_close(features, expected["fp32/image_norm"][exact], atol=1e-5, rtol=0)
    palette = next(picture for picture in pictures() if picture.mode == "P")
    assert not torch.allclose(towers.preprocess(palette), towers.preprocess(palette.convert("RGB")), atol=0.1)


def test_the_training_loss_and_its_gradients(name, folder):
    towers, expected = load_towers(folder), arrays(GOLDEN / name / "expected.npz")
    golden = json.loads((GOLDEN / name / "expected_loss.json").read_text())
    ids = towers.tokenize(golden["texts"])
    loss = ClipLoss()(towers.encode_pixels(expected["images"]), towers.encode_tokens(ids), towers.scale)
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-5)
    loss.backward()
    gradients = {key: p.grad for key, p in towers.named_parameters() if p.grad is not None}
    compared = 0
    for key, (_, norm, _) in golden["grads"].items():
        if norm > 1e-4:
            assert gradients[key].norm().item() == pytest.approx(norm, rel=1e-3), key
            compared += 1
    assert compared > 50


def test_positions_are_resized_with_aligned_corners():
    golden = arrays(GOLDEN / "vit" / "pos_embed_resize.npz")
    torch.testing.assert_close(resize_positions(golden["old"], 7), golden["new"], atol=1e-5, rtol=0)
    assert resize_positions(golden["old"], 5) is golden["old"]


def test_another_image_size(published, tmp_path):
    settings = ChineseClipImport(configs=configs("vit"), image_size=56)
    out = import_chinese_clip(published / "vit.pt", tmp_path / "out", settings)
    towers = load_towers(out)
    positions = checkpoint("vit")["state_dict"]["module.visual.positional_embedding"]
    assert torch.equal(towers.state_dict()["visual.positional_embedding"], resize_positions(positions, 7))
    assert towers.encode_image(pictures()).shape == (6, 48)
    for source, size in (("vit", 60), ("rn", 96)):
        settings = ChineseClipImport(configs=configs(source), image_size=size)
        with pytest.raises(ModelError, match="multiple of its patch size"):
            import_chinese_clip(published / f"{source}.pt", tmp_path / "no", settings)


def test_patch_dropout_keeps_some_patches_in_training():
    towers = ChineseClipTowers(replace(read_published_config(*configs("vit")), patch_dropout=0.3), vocabulary())
    seen = []
    towers.visual.get_submodule("ln_pre").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    for mode in (True, False):
        towers.train(mode).encode_pixels(torch.zeros(1, 3, 40, 40))
    assert seen == [1 + int(25 * 0.7), 26]


# word pieces


@pytest.mark.parametrize("entry", TOKENS, ids=[str(index) for index in range(len(TOKENS))])
def test_word_pieces(entry):
    pieces = WordPieces(vocabulary(), google=True)
    assert pieces.pieces(entry["text"]) == entry["tokens"]
    assert pieces([entry["text"]], 52).tolist() == [entry["ids52"]]
    assert pieces([entry["text"]], 24).tolist() == [entry["ids24"]]
    assert normalise_caption(entry["text"]) == entry["preprocessed"]
    assert pieces([entry["preprocessed"]], 52).tolist() == [entry["ids52_preprocessed"]]


def test_the_two_variants_of_word_pieces_differ():
    vocab = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[", "]", "sep", "a", "##a"]).encode()
    google, other = WordPieces(vocab, google=True), WordPieces(vocab, google=False)
    assert google.pieces("[SEP]") == ["[", "sep", "]"]
    assert other.pieces("[SEP]") == ["[SEP]"]
    assert google.pieces("a" * 200) == ["a"] + ["##a"] * 199
    assert google.pieces("a" * 201) == other.pieces("a" * 101) == ["[UNK]"]
    assert google.pieces("a\ue000") == ["[UNK]"]
    assert other.pieces("a\ue000") == ["a"]
    assert google.pieces("") == []


def test_long_and_broken_texts(name, folder, caplog):
    towers = load_towers(folder)
    with caplog.at_level(logging.WARNING):
        ids = towers.tokenize(["红" * 100_000, "红", "\ud800"])
    assert "1 of 3 texts are longer than 52 tokens and were cut" in caplog.text
    assert isinstance(ids, torch.Tensor)
    assert ids.shape == (3, 52)
    assert ids[:, 0].tolist() == [101] * 3
    assert ids[0, -1] == 102


# importing


def command(source: Path, out: Path, name: str = "vit", *more: str) -> list[str]:
    vision, text = configs(name)
    options = ["--vision-config", str(vision), "--text-config", str(text), "--out", str(out)]
    return ["import", "chinese-clip", str(source), *options, *more]


def test_the_command(published, tmp_path, capsys):
    out = tmp_path / "towers"
    assert run(command(published / "vit.pt", out)) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]
    towers = load_towers(out)
    golden = arrays(GOLDEN / "vit" / "expected.npz")
    texts = json.loads((GOLDEN / "vit" / "expected_loss.json").read_text())["texts"]
    torch.testing.assert_close(towers.tokenize(texts), golden["text_ids"], atol=0, rtol=0)
    torch.testing.assert_close(towers.encode_text(texts), golden["fp32/text_norm"], atol=1e-5, rtol=0)
    assert run(command(published / "vit.pt", out)) == 2
    assert "is not empty" in capsys.readouterr().err


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def damage(source: Path, kind: str, made: Path) -> None:
    content = torch.load(source, weights_only=True)
    weights = content["state_dict"]
    if kind == "missing":
        del weights["module.text_projection"], weights["module.visual.proj"]
    elif kind == "unexpected":
        weights["module.extra"] = torch.zeros(1)
    elif kind == "shape":
        weights["module.text_projection"] = torch.zeros(32, 40)
    elif kind == "no tensor":
        weights["module.text_projection"] = 3
    elif kind == "malicious":
        content["extra"] = Malicious(made)
    torch.save(content, source)
    if kind == "truncated":
        source.write_bytes(source.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "missing: text_projection, visual.proj"),
        ("unexpected", "unexpected: extra"),
        ("shape", r"of another shape: text_projection [32, 40] instead of [32, 48]"),
        ("no tensor", "not a tensor: text_projection"),
        ("malicious", "is refused: it asks for posix.mkdir"),
        ("truncated", "truncated"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(published, tmp_path, capsys, kind, message):
    for name in ("vit.pt", "vocab.txt"):
        shutil.copy(published / name, tmp_path)
    damage(tmp_path / "vit.pt", kind, tmp_path / "made")
    assert run(command(tmp_path / "vit.pt", tmp_path / "out")) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vit.pt", "vocab.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.pt", "--out", "out"], "no checkpoint at absent.pt"),
        (["absent.pt", "--out", "out", "--model", "ViT-Z"], "no published Chinese-CLIP is called 'ViT-Z'"),
        (["absent.pt", "--out", "out", "--vision-config", "a.json"], "go together"),
        (["absent.pt", "--out", "out", "--vision-config", "a", "--text-config", "b"], "a is missing or not a JSON"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert run(["import", "chinese-clip", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_vocabulary_is_needed(published, tmp_path):
    shutil.copy(published / "vit.pt", tmp_path)
    with pytest.raises(ModelError, match="no vocabulary at .*vocab.txt"):
        import_chinese_clip(tmp_path / "vit.pt", tmp_path / "out", ChineseClipImport(configs=configs("vit")))


def test_damaged_folders(folder, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    (copied / "vocab.txt").write_bytes(b"a\nb\n")
    with pytest.raises(ModelError, match="not a BERT vocabulary"):
        load_towers(copied)
    (copied / "vocab.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ModelError, match="not UTF-8"):
        load_towers(copied)
    (copied / "vocab.txt").write_bytes(vocabulary() + b"more\n")
    with pytest.raises(ModelError, match="21129 pieces, and the towers only 21128"):
        load_towers(copied)


def test_configurations_of_the_original():
    vision, text = configs("rn")
    config = read_published_config(vision, text)
    assert config.vision_layers == [1, 2, 1, 1]
    assert config.patch_size is None
    with pytest.raises(ModelError, match="neither .* says 'vision_layers'"):
        read_published_config(text, text)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("ViT-B-16", 188), ("ViT-L-14", 406), ("ViT-L-14-336", 407), ("ViT-H-14", 958), ("RN50", 77)],
)
def test_published_sizes(name, millions):
    """The numbers of parameters in the project's own table (its README)."""
    with torch.device("meta"):
        towers = ChineseClipTowers(PUBLISHED[name], vocabulary())
    assert round(sum(parameter.numel() for parameter in towers.parameters()) / 1e6) == millions
