"""`import llamagen`: what is read, what is refused in one line, and that nothing half-written stays."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.named_prompts import NamedPrompts, named_prompts_file
from data.text import TextError
from generation.drawing.memory import plan_drawing
from generation.llamagen.classes import class_names
from generation.llamagen.importing import PUBLISHED, picture_side
from generation.llamagen.settings import LlamaGenImport
from generation.rows.frame import PromptFrame
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from mmwudao.loading.importing import import_llamagen
from mmwudao.loading.model_dir import read_model_config
from tests.helpers.cli import refused_import
from tests.helpers.llamagen import CAPTION_WIDTH, caption_vectors, write_checkpoints, write_t5
from vqvae.storage.parts import ModelError, without_weights
from vqvae.vq16 import VQ16Config

SIZES = ["--image-size", "8", "--heads", "4", "--layers", "2"]
SETTINGS = LlamaGenImport(image_size=8, heads=4, layers=2)
LAYER = "layers.1.feed_forward.w2.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_checkpoints(tmp_path_factory.mktemp("llamagen") / "published", torch.bfloat16)


def call(files: dict[str, Path], source: Path | None = None, kind: str = "c2i") -> list[str]:
    vectors = ["--vectors", str(files["vectors"])] if kind == "t2i" else []
    return [str(source or files[kind]), "--tokenizer", str(files["vq"]), *SIZES, *vectors]


# what is read


def test_every_way_to_store_the_weights_is_the_same_model(files: dict[str, Path], tmp_path: Path) -> None:
    tensors = torch.load(files["c2i"], weights_only=True)["model"]
    stored = {"module": {"module": tensors, "args": None}, "plain": tensors, "freqs": {"model": tensors | {
        "freqs_cis": torch.zeros(3, 2, 2)}}}  # fmt: skip
    paths = [files["c2i"]]
    for name, content in stored.items():
        paths.append(tmp_path / f"{name}.pt")
        torch.save(content, paths[-1])
    paths.append(tmp_path / "plain.safetensors")
    save_file(tensors, paths[-1])
    hashes = {
        read_model_config(import_llamagen(path, files["vq"], tmp_path / f"m-{n}", SETTINGS)).model_hash
        for n, path in enumerate(paths)
    }
    assert len(hashes) == 1


def test_an_encoder_belongs_to_the_hash_of_the_model(files: dict[str, Path], tmp_path: Path) -> None:
    write_t5(tmp_path / "t5")
    hashes = set()
    for name, options in (("a", {"vectors": files["vectors"]}), ("b", {"t5": tmp_path / "t5"})):
        model = import_llamagen(files["t2i"], files["vq"], tmp_path / name, SETTINGS, **options)
        config = read_model_config(model)
        assert (config.default_sampling.guidance, config.default_sampling.top_k) == (7.5, 1000)
        assert "encoder" in config.parts
        hashes.add(config.model_hash)
    assert len(hashes) == 2


def test_names_of_classes(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_bytes(named_prompts_file("class", class_names(1000)))
    names = NamedPrompts(tmp_path / "names.json")
    assert names.encode("Golden  Retriever") == names.encode("207") == [207]
    assert names.encode("Tinca tinca") == [0]
    assert names.decode([207, 0]) == "golden retriever, tench"
    with pytest.raises(ValueError, match=r"'crane' names the class 134 and 517: give the number"):
        names.encode("crane")
    with pytest.raises(ValueError, match=r"no class 'golden retrievr'.*such as 'golden retriever'"):
        names.encode("golden retrievr")
    with pytest.raises(ValueError, match="no class '1000'"):
        names.encode("1000")
    (tmp_path / "own.txt").write_text("cat, kitty\ndog\n")
    assert class_names(2, tmp_path / "own.txt") == [["cat", "kitty"], ["dog"]]
    assert class_names(3) == [[], [], []]
    with pytest.raises(ModelError, match="names 2 classes, and the model draws 3"):
        class_names(3, tmp_path / "own.txt")
    (tmp_path / "names.json").write_bytes(b"{}")
    with pytest.raises(TextError, match="damaged"):
        NamedPrompts(tmp_path / "names.json")


def test_the_size_of_pictures() -> None:
    assert picture_side(Path("t2i_XL_stage1_256.pt"), None, 16) == 16
    assert picture_side(Path("c2i_B_384.pt"), 512, 16) == 32
    for name, size, message in (
        ("c2i_3B.pt", None, "does not say in its name"),
        ("c2i_256_384.pt", None, "does not say in its name"),
        ("c2i_B_256.pt", 250, "cannot draw 250 px"),
        ("c2i_B_256.pt", 2048, "cannot draw 2048 px"),
    ):
        with pytest.raises(ModelError, match=message):
            picture_side(Path(name), size, 16)


# what is refused

WRONG_WEIGHTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda found: found.pop(LAYER), f"missing: {LAYER}"),
    "unexpected": (lambda found: found.update(stranger=torch.zeros(1)), "unexpected: stranger"),
    "shape": (
        lambda found: found.update({LAYER: torch.zeros(64, 255, dtype=torch.bfloat16)}),
        f"of another shape: {LAYER} [64, 255] instead of [64, 256]",
    ),
    "numbers": (lambda found: found[LAYER].view(-1)[3:4].fill_(float("nan")), f"with NaN or infinite numbers: {LAYER}"),
    "types": (lambda found: found.update({LAYER: found[LAYER].float()}), "instead of one floating type"),
    "lost layer": (
        lambda found: [found.pop(key) for key in list(found) if key.startswith("layers.1.")],
        "it has 1 layers, and a model that is 64 wide has 2",
    ),
    "another model": (
        lambda found: [found.pop(key) for key in list(found) if key.startswith("cls_embedding")],
        "is no transformer of LlamaGen",
    ),
    "another tokenizer": (
        lambda found: found.update({"tok_embeddings.weight": torch.zeros(50, 64, dtype=torch.bfloat16)}),
        "draws 50 codes, and the tokenizer has 48",
    ),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_wrong_weights_are_named(
    files: dict[str, Path], tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = WRONG_WEIGHTS[case]
    tensors = torch.load(files["c2i"], weights_only=True)["model"]
    change(tensors)
    torch.save({"model": tensors}, tmp_path / "changed.pt")
    assert message in refused_import("llamagen", call(files, tmp_path / "changed.pt"), capsys, tmp_path / "out")


def test_damaged_files(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, cut = tmp_path / "out", tmp_path / "cut.pt"
    data = files["t2i"].read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    assert "cut.pt" in refused_import("llamagen", call(files, cut, "t2i"), capsys, out)
    swapped = [str(files["vq"]), "--tokenizer", str(files["c2i"]), *SIZES]
    assert "looks like the picture tokenizer of LlamaGen" in refused_import("llamagen", swapped, capsys, out)
    same = [str(files["c2i"]), "--tokenizer", str(files["c2i"]), *SIZES]
    assert "looks like LlamaGen's transformer" in refused_import("llamagen", same, capsys, out)
    nowhere = [str(tmp_path / "nowhere.pt"), "--tokenizer", str(files["vq"])]
    assert "no checkpoint at" in refused_import("llamagen", nowhere, capsys, out)


def test_options_that_do_not_fit(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, tokenizer = tmp_path / "out", ["--tokenizer", str(files["vq"])]
    for arguments, message in (
        ([str(files["t2i"]), *tokenizer, *SIZES], "draws captions: give the folder of its text encoder"),
        ([*call(files), "--vectors", str(files["vectors"])], "draws classes, which need neither"),
        ([str(files["c2i"]), *tokenizer, "--image-size", "8"], "64 wide, as no published model: say its --heads"),
        ([*call(files), "--image-size", "7"], "the model cannot draw 7 px"),
        ([*call(files), "--heads", "5"], "heads=5 must divide width=64"),
        ([*call(files), "--layers", "3"], "it has 2 layers, and a model that is 64 wide has 3"),
        ([*call(files), "--classes", str(tmp_path / "none")], "no names at"),
    ):
        assert message in refused_import("llamagen", arguments, capsys, out), message


def test_vectors_that_do_not_fit(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vectors.safetensors"
    arguments = [str(files["t2i"]), "--tokenizer", str(files["vq"]), *SIZES, "--vectors", str(path)]
    for tensors, message in (
        ({"a": torch.zeros(3, CAPTION_WIDTH + 1)}, "'a' has the shape [3, 25], and the generator reads 1 to 120"),
        ({"a": torch.zeros(121, CAPTION_WIDTH)}, "has the shape [121, 24]"),
        ({"a": torch.full((1, CAPTION_WIDTH), torch.inf)}, "are not all finite numbers"),
        ({"a": torch.zeros(1, CAPTION_WIDTH, dtype=torch.int64)}, "are not all finite numbers"),
    ):
        save_file(tensors, path)
        assert message in refused_import("llamagen", arguments, capsys, tmp_path / "out")
    path.write_bytes(path.read_bytes()[:40])
    assert "truncated or damaged" in refused_import("llamagen", arguments, capsys, tmp_path / "out")


def test_text_encoders_that_do_not_fit(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "t5"
    write_t5(folder)
    capsys.readouterr()  # transformers tells of its progress
    arguments = [str(files["t2i"]), "--tokenizer", str(files["vq"]), *SIZES, "--t5", str(folder)]

    def refused() -> str:
        return refused_import("llamagen", arguments, capsys, tmp_path / "out")

    tensors = load_file(folder / "model.safetensors")
    norm = "encoder.final_layer_norm.weight"
    save_file({key: value for key, value in tensors.items() if key != norm}, folder / "model.safetensors")
    assert f"missing: {norm}" in refused()
    save_file(tensors, folder / "model.safetensors")
    shutil.move(folder / "tokenizer.json", tmp_path / "kept.json")
    assert "no text tokenizer at" in refused()
    shutil.move(tmp_path / "kept.json", folder / "tokenizer.json")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_layers": 2', '"num_layers": 3'))
    assert "missing: " in refused()
    (folder / "config.json").write_text(text.replace('"t5"', '"bert"'))
    assert "its model_type is 'bert'" in refused()
    (folder / "config.json").unlink()
    assert "config.json is missing" in refused()


# the published sizes


def test_published_sizes() -> None:
    """The numbers of parameters that the paper names, and that the smallest is drawn with by the fused step."""
    millions = {768: 111, 1024: 343, 1280: 775, 1536: 1411, 3200: 3100}
    for width, expected in millions.items():
        heads, depth = PUBLISHED[width]
        hidden = -(-int(8 * width / 3) // 256) * 256
        config = TransformerConfig(
            num_image_codes=16384, num_text_pieces=1001, width=width, depth=depth, heads=heads, mlp_width=hidden,
            max_text=1, grid=(24, 24), position="rotary_codes", qk_norm=False, tie_embeddings=False, image_head="codes",
            frame=PromptFrame("bare", blank=1000), block_rows=2,
        )  # fmt: skip
        with without_weights():
            model = Transformer(config)
        assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - expected) < 0.02 * expected
        plan = plan_drawing(config, VQ16Config(), torch.bfloat16, "cpu")
        assert bool(plan.matrices) == (width == 768)
        assert plan.cache == 2 * depth * 2 * width * (1 + 576 + 2) * 4


def test_an_encoder_is_planned() -> None:
    config = TransformerConfig(width=64, depth=1, heads=4)
    plain = plan_drawing(config, VQ16Config(), torch.float32, "cpu")
    assert plan_drawing(config, VQ16Config(), torch.float32, "cpu", encoder=7).total == plain.total + 7
    assert sum(len(one) for one in caption_vectors().values()) == 11
