"""Towers in the layout of transformers behind our interface, compared with transformers itself on random weights."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from mmwudao.cli.app import run
from retrieval.towers.base import Towers, load_towers
from retrieval.towers.importing import import_transformers
from retrieval.towers.settings import TransformersImport
from tests.helpers.hub_folders import KINDS, write_hub_folder
from vqvae.storage.parts import ModelError, content_hash, stored_hash

TEXTS = ["a red apple", "", "红苹果", "red a. " * 40]
SIGLIP = ("siglip", "siglip2", "siglip2-fixed")


def pictures() -> list[Image.Image]:
    gradient = Image.radial_gradient("L").resize((70, 40))
    return [Image.merge("RGB", [gradient, gradient.transpose(Image.Transpose.FLIP_LEFT_RIGHT), gradient]), gradient]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any, Towers]]:
    """Kind -> its folder, the model of transformers, our towers; each is made once."""
    made: dict[str, tuple[Path, Any, Towers]] = {}

    def get(kind: str) -> tuple[Path, Any, Towers]:
        if kind not in made:
            place = tmp_path_factory.mktemp(kind)
            model = write_hub_folder(place / "hub", kind)
            made[kind] = place / "hub", model, load_towers(import_transformers(place / "hub", place / "towers"))
        return made[kind]

    return get


def unit(output: Any) -> torch.Tensor:
    return torch.nn.functional.normalize(output.pooler_output, dim=-1)


@torch.no_grad()
def features_of_transformers(folder: Path, model: Any, kind: str, towers: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors of `pictures` and `TEXTS` by the model and the processor that transformers finds in the folder."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    # a Siglip2Processor would overrule the folder's number of patches by its own
    images = processor.image_processor([picture.convert("RGB") for picture in pictures()], return_tensors="pt")
    padding = "max_length" if kind in SIGLIP else True
    texts = processor.tokenizer(
        TEXTS, padding=padding, truncation=True, max_length=towers.text.max_tokens, return_tensors="pt"
    )
    names = ["input_ids"] if kind in SIGLIP else [*texts]  # SigLIP was trained without a mask
    return (
        unit(model.get_image_features(**images)),
        unit(model.get_text_features(**{name: texts[name] for name in names})),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_transformers(hub, kind):
    folder, model, towers = hub(kind)
    images, texts = features_of_transformers(folder, model, kind, towers)
    torch.testing.assert_close(towers.encode_image(pictures()), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(towers.encode_text(TEXTS), texts, atol=1e-5, rtol=0)
    torch.testing.assert_close(towers.encode_text(TEXTS[:1]), texts[:1], atol=1e-5, rtol=0)
    torch.testing.assert_close(towers.scale, model.logit_scale.exp().reshape(()))
    assert (texts[0] - texts[2]).abs().max() > 0.01
    assert images.shape == (2, towers.embed_dim)
    assert towers.image_size == 32


@pytest.mark.parametrize("kind", SIGLIP)
def test_siglip_sees_its_padding(hub, kind):
    """Left out, or hidden by the mask that the tokenizer of transformers makes, it gives other vectors."""
    folder, model, towers = hub(kind)
    ids = towers.tokenize(["a red apple"])
    assert ids.shape == (1, 16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    count = towers.count_tokens(ids)[0]
    assert tokenizer("a red apple", padding=False)["input_ids"] == ids[0, :count].tolist()  # padding is on the right
    assert set(ids[0, count:].tolist()) == {tokenizer.pad_token_id}
    with torch.no_grad():
        short = unit(model.get_text_features(input_ids=ids[:, :count]))
        hidden = unit(model.get_text_features(input_ids=ids, attention_mask=(torch.arange(16) < count).long()[None]))
    ours = towers.encode_text(["a red apple"])
    assert (ours - short).abs().max() > 1e-3
    assert (ours - hidden).abs().max() > 1e-3
    with pytest.raises(ModelError, match="exactly 16 tokens, not 8"):
        import_transformers(folder, folder.parent / "short", TransformersImport(max_tokens=8))


@pytest.mark.parametrize("kind", SIGLIP)
def test_siglip_reads_small_letters(hub, kind):
    """The fixed sizes of SigLIP 2 are published with a tokenizer that keeps capitals, and were trained without them."""
    folder, _, towers = hub(kind)
    assert torch.equal(towers.tokenize(["A RED apple"]), towers.tokenize(["a red apple"]))
    assert towers.text.lower == (kind == "siglip2-fixed")
    if kind == "siglip2-fixed":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer("A RED apple")["input_ids"] != tokenizer("a red apple")["input_ids"]


def test_pictures_are_squashed_or_cropped(hub):
    """Two pictures that differ only at their ends: CLIP crops them away, SigLIP and Chinese-CLIP squash them in."""
    plain = Image.new("RGB", (96, 32), (200, 30, 30))
    ends = plain.copy()
    ends.paste((20, 30, 220), (0, 0, 24, 32))
    for kind, sees in (
        ("clip", False),
        ("metaclip_2", False),
        ("altclip", False),
        ("siglip", True),
        ("chinese_clip", True),
    ):
        towers = hub(kind)[2]
        assert torch.equal(towers.preprocess(plain), towers.preprocess(ends)) != sees, kind
    assert hub("siglip")[2].pixel_mean == (0.5, 0.5, 0.5)
    assert hub("clip")[2].pixel_mean == (0.48145466, 0.4578275, 0.40821073)


def test_siglip_2_keeps_the_shape_of_a_picture(hub):
    """A wide picture has more columns than rows, and a square packed by us is the square that the processor packs."""
    folder, model, towers = hub("siglip2")
    wide = towers.preprocess(Image.radial_gradient("L").resize((320, 80)))
    assert wide.shape == (16, 8 * 8 * 3 + 2)
    assert (wide[:, -2].sum().item(), wide[:, -1].sum().item()) == (16, 8)  # 2 rows of 8
    square = pictures()[0].resize((32, 32))
    pixels = torch.stack(
        [transformers.SiglipImageProcessor(size={"height": 32, "width": 32})(square)["pixel_values"][0]]
    )
    torch.testing.assert_close(towers.encode_image(pixels), towers.encode_image([square]), atol=1e-5, rtol=0)
    half = towers.to(torch.bfloat16).encode_image([pictures()[0]])
    towers.to(torch.float32)
    assert (half - towers.encode_image([pictures()[0]])).abs().max() < 0.05


def test_pooled_places(hub):
    """CLIP and MetaCLIP 2 take the place of the end token, AltCLIP and Chinese-CLIP the first, whatever lies behind."""
    for kind in ("clip", "metaclip_2", "altclip", "chinese_clip"):
        towers = hub(kind)[2]
        tokens = towers.tokenize(["a red apple"])
        changed = {**tokens, "ids": torch.where(tokens["mask"] == 1, tokens["ids"], 5)}
        torch.testing.assert_close(towers.encode_tokens(tokens), towers.encode_tokens(changed), atol=1e-6, rtol=0)


def test_texts_are_cut_told_and_prefixed(hub, tmp_path, caplog):
    folder, _, towers = hub("clip")
    with caplog.at_level(logging.WARNING):
        towers.tokenize(["red " * 18, "\ud800"])
        assert "were cut" not in caplog.text
        towers.tokenize(["red " * 19, "red " * 50_000, "red"])
    assert "2 of 3 texts are longer than 20 tokens and were cut" in caplog.text
    settings = TransformersImport(max_tokens=10, prefix="a ")
    other: Any = load_towers(import_transformers(folder, tmp_path / "towers", settings))
    torch.testing.assert_close(other.encode_text(["red"]), towers.encode_text(["a red"]), atol=1e-5, rtol=0)
    assert other.tokenize(["red"])["ids"].shape == (1, 10)
    assert content_hash(other) != content_hash(towers)
    with pytest.raises(ModelError, match="places for 20 tokens, not for 21"):
        import_transformers(folder, tmp_path / "long", TransformersImport(max_tokens=21))


def test_settings_and_tokenizer_are_part_of_the_hash(hub, tmp_path):
    folder, _, towers = hub("clip")
    out = shutil.copytree(folder.parent / "towers", tmp_path / "towers")
    assert stored_hash(out) == content_hash(towers)
    tokenizer = out / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes().replace(b'"9</w>"', b'"?</w>"'))
    with pytest.raises(ModelError, match="a file of its tokenizer is not the one that was imported"):
        load_towers(out)


@pytest.mark.parametrize("kind", ["clip", "altclip"])
def test_several_files_pickles_and_older_names(hub, tmp_path, kind):
    folder, _, towers = hub(kind)
    expected = towers.encode_text(TEXTS)
    sharded = tmp_path / "sharded"
    write_hub_folder(sharded, kind, max_shard_size="20KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert torch.equal(load_towers(import_transformers(sharded, tmp_path / "a")).encode_text(TEXTS), expected)
    older = shutil.copytree(folder, tmp_path / "older")
    weights = load_file(older / "model.safetensors")
    # as the first versions stored them: with a buffer, and the vision layers of AltCLIP called as CLIP's
    weights = {
        name.replace("vision_model.encoder.layer.", "vision_model.encoder.layers."): t for name, t in weights.items()
    }
    weights["text_model.embeddings.position_ids"] = torch.arange(20)[None]
    torch.save(weights, older / "pytorch_model.bin")
    (older / "model.safetensors").unlink()
    again = load_towers(import_transformers(older, tmp_path / "b"))
    assert torch.equal(again.encode_text(TEXTS), expected)
    assert torch.equal(again.encode_image(pictures()), towers.encode_image(pictures()))


def change(path: Path, **changes: Any) -> None:
    record = json.loads(path.read_text())
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (record[section] if section else record)[key] = value
    path.write_text(json.dumps(record))


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def truncate(path: Path, bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:bytes])


def without(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors")


PROGRAM = {"AutoModel": "evil.Model"}
BAD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated": ("clip", lambda f: truncate(f / "model.safetensors", 9000), "truncated or damaged"),
    "no weights": ("clip", lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "a tensor missing": ("clip", lambda f: without(f, "text_projection.weight"), "missing: text_projection.weight"),
    "no tokenizer": ("clip", drop_tokenizer, "has no tokenizer"),
    "half a tokenizer": ("clip", lambda f: truncate(f / "tokenizer.json", 300), "damaged or not whole"),
    "no pictures": ("clip", lambda f: (f / "preprocessor_config.json").unlink(), "preprocessor_config.json is missing"),
    "no config": ("clip", lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config not JSON": ("clip", lambda f: truncate(f / "config.json", 20), "not a JSON object"),
    "unknown type": (
        "clip", lambda f: change(f / "config.json", model_type="clvp"),
        "a model of the type 'clvp'; read are clip, siglip, siglip2, altclip, chinese_clip, metaclip_2",
    ),
    "another width": (
        "clip", lambda f: change(f / "config.json", text_config__hidden_size=32), "of another shape",
    ),
    "more layers": (
        "siglip", lambda f: change(f / "config.json", vision_config__num_hidden_layers=3), "missing: 16 tensors",
    ),
    "too many layers": (
        "siglip", lambda f: change(f / "config.json", vision_config__num_hidden_layers=10**6), "from 1 to 256",
    ),
    "another picture": (
        "clip", lambda f: change(f / "config.json", vision_config__image_size=64), "config.json says image_size 64",
    ),
    "a huge picture": (
        "clip", lambda f: change(f / "preprocessor_config.json", size={"shortest_edge": 10**6}), "size must be",
    ),
    "not cropped": (
        "clip", lambda f: change(f / "preprocessor_config.json", do_center_crop=False), "config.json says image_size",
    ),
    "other patches": (
        "siglip2", lambda f: change(f / "preprocessor_config.json", patch_size=16), "patches of 16 pixels",
    ),
    "another processor": (
        "clip", lambda f: change(f / "preprocessor_config.json", image_processor_type="BlipImageProcessor"),
        "prepares pictures by BlipImageProcessor, which does not go with a CLIPModel",
    ),
    "fewer words": (
        "siglip2", lambda f: change(f / "config.json", text_config__vocab_size=50), "config.json says 50",
    ),
    "another end": (
        "metaclip_2", lambda f: change(f / "config.json", text_config__eos_token_id=49407),
        "the tokenizer says eos_token_id 2, and config.json says 49407",
    ),
    "quantised": (
        "clip", lambda f: change(f / "config.json", quantization_config={"bits": 4}), "quantised weights",
    ),
    "a program in the configuration": (
        "clip", lambda f: change(f / "config.json", auto_map=PROGRAM), "names a program (auto_map), and none is run",
    ),
    "a program in the tokenizer": (
        "clip", lambda f: change(f / "tokenizer_config.json", auto_map=PROGRAM), "names a program (auto_map)",
    ),
    "a program for pictures": (
        "clip", lambda f: change(f / "preprocessor_config.json", auto_map=PROGRAM), "names a program (auto_map)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD))
def test_what_does_not_fit_is_refused_in_one_line(hub, tmp_path, capsys, name):
    kind, damage, message = BAD[name]
    source = shutil.copytree(hub(kind)[0], tmp_path / "source")
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    damage(source)
    capsys.readouterr()  # the fixture's folder may be made here, with a bar of its own
    assert run(["import", "transformers", str(source), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "shards must lie beside it"),
        ({"weight_map": {"a": "model-9.safetensors"}}, "the shard model-9.safetensors of 1 is missing"),
        ({"weight_map": []}, "it has no weight_map"),
        ({"weight_map": {"a": "whole.safetensors"}}, "lacks 1 tensors of the index, such as a"),
    ],
)
def test_an_index_that_is_wrong(hub, tmp_path, changes, message):
    source = shutil.copytree(hub("clip")[0], tmp_path / "source")
    (source / "model.safetensors").rename(source / "whole.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps(changes))
    with pytest.raises(ModelError, match=message):
        import_transformers(source, tmp_path / "out")


def test_no_kernel_of_the_hub_is_named(hub, tmp_path):
    """A configuration may ask transformers for an attention that it would fetch and run."""
    source = shutil.copytree(hub("clip")[0], tmp_path / "source")
    change(source / "config.json", _attn_implementation="evil/kernel", attn_implementation="evil/kernel")
    towers = load_towers(import_transformers(source, tmp_path / "towers"))
    assert "evil" not in (tmp_path / "towers" / "config.json").read_text()
    assert torch.equal(towers.encode_text(TEXTS), hub("clip")[2].encode_text(TEXTS))
