"""`import janus`: what is read, what is refused in one line, and that nothing half-written stays."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from generation.drawing.memory import plan_drawing
from generation.janus.configuration import TEMPLATES
from generation.janus.settings import JanusImport
from mmwudao.cli.app import run
from mmwudao.loading.importing import import_janus
from mmwudao.loading.model_dir import read_model_config
from mmwudao.pipeline import load
from tests.helpers.cli import one_error, refused_import
from tests.helpers.janus import PROMPT, as_original, make_janus, save_janus
from tests.helpers.live_memory import LiveMemory
from vqvae.tokenizers import decoding_bytes
from vqvae.vq16 import VQ16, VQ16Config

LAYER = "model.language_model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, as the published files are, in transformers' layout."""
    return save_janus(make_janus().bfloat16(), tmp_path_factory.mktemp("janus") / "Janus-Pro-1B")


@pytest.fixture(scope="module")
def imported(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_janus(published, tmp_path_factory.mktemp("janus") / "model", JanusImport())


def hash_of(source: Path, out: Path) -> str:
    return read_model_config(import_janus(source, out, JanusImport())).model_hash


def with_weights(published: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the folder with other weights."""
    shutil.copytree(published, folder)
    tensors = load_file(published / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def with_config(published: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the folder with another config.json."""
    shutil.copytree(published, folder)
    record = json.loads((folder / "config.json").read_text())
    change(record)
    (folder / "config.json").write_text(json.dumps(record))
    return folder


# what is read


def test_shards_and_pickles_are_the_same_model(published: Path, imported: Path, tmp_path: Path) -> None:
    expected = read_model_config(imported).model_hash
    tensors = load_file(published / "model.safetensors")
    names = sorted(tensors)
    for kind, suffix in (("safetensors", "model-{}.safetensors"), ("pickles", "pytorch_model-{}.bin")):
        folder = shutil.copytree(published, tmp_path / kind)
        (folder / "model.safetensors").unlink()
        places: dict[str, str] = {}
        for number, some in enumerate((names[::2], names[1::2])):
            file = suffix.format(number)
            content = {name: tensors[name].clone() for name in some}
            save_file(content, folder / file) if kind == "safetensors" else torch.save(content, folder / file)
            places |= dict.fromkeys(some, file)
        index = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
        (folder / f"{index}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        assert hash_of(folder, tmp_path / f"{kind}-model") == expected
    single = shutil.copytree(published, tmp_path / "single")
    (single / "model.safetensors").unlink()
    torch.save(tensors, single / "pytorch_model.bin")
    assert hash_of(single, tmp_path / "single-model") == expected


def test_the_import_makes_one_tensor_at_a_time(published: Path, tmp_path: Path) -> None:
    total = sum(tensor.nbytes for tensor in load_file(published / "model.safetensors").values())
    largest = 512 * 64 * 2  # the embedding in bfloat16
    with LiveMemory() as measured:
        import_janus(published, tmp_path / "model", JanusImport())
    assert measured.peak < total + 4 * largest + 300_000, "blocks of a million numbers are looked at together"


def test_the_template_of_the_first_janus(published: Path, tmp_path: Path) -> None:
    named = shutil.copytree(published, tmp_path / "Janus-1.3B")
    told = {named: "auto", published: "first"}
    for place, (source, template) in enumerate(told.items()):
        model = import_janus(source, tmp_path / f"model-{place}", JanusImport(template=template))  # type: ignore[arg-type]
        pipeline = load(model, device="cpu")
        assert pipeline.text.decode(pipeline.text.encode(" a dog ")) == "User: a dog\n\nAssistant:"


def test_the_licence_is_kept(published: Path, tmp_path: Path) -> None:
    source = shutil.copytree(published, tmp_path / "named")
    (source / "LICENSE-MODEL").write_text("Use restrictions apply.")
    card = (import_janus(source, tmp_path / "model", JanusImport(name="mine")) / "README.md").read_text()
    assert card.startswith("# mine\n")
    assert "Use restrictions apply." in card


# what is refused


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], out: Path) -> str:
    return refused_import("janus", arguments, capsys, out)


def test_a_truncated_shard(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(published, tmp_path / "cut")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "model.safetensors is truncated or damaged" in refused([str(folder)], capsys, tmp_path / "out")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert "the shard model-1.safetensors of 1 is missing" in refused([str(folder)], capsys, tmp_path / "out")
    save_file({"b": torch.zeros(1)}, folder / "model-1.safetensors")
    assert "lacks 1 tensors of the index, such as a" in refused([str(folder)], capsys, tmp_path / "out")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "shards must lie beside it" in refused([str(folder)], capsys, tmp_path / "out")


WRONG_WEIGHTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda found: found.pop(LAYER), f"missing: {LAYER}"),
    "unexpected": (lambda found: found.update(stranger=torch.zeros(1)), "unexpected: stranger"),
    "shape": (
        lambda found: found.update({LAYER: torch.zeros(64, 95, dtype=torch.bfloat16)}),
        f"of another shape: {LAYER} [64, 95] instead of [64, 96]",
    ),
    "numbers": (lambda found: found[LAYER].view(-1)[3:4].fill_(float("nan")), f"with NaN or infinite numbers: {LAYER}"),
    "types": (lambda found: found.update({LAYER: found[LAYER].float()}), "instead of one floating type"),
    "no tokenizer": (
        lambda found: [found.pop(key) for key in list(found) if "vqmodel.encoder.down" in key],
        "no VQ-16 tokenizer",
    ),
    "flow": (lambda found: found.update({"vision_gen_enc_model.conv.weight": torch.zeros(1)}), "it is JanusFlow"),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_wrong_weights_are_named(
    published: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = WRONG_WEIGHTS[case]
    folder = with_weights(published, tmp_path / "changed", change)
    assert message in refused([str(folder)], capsys, tmp_path / "out")


WRONG_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another width": (
        lambda record: record["text_config"].update(hidden_size=128, head_dim=None),
        "of another shape",
    ),
    "heads of another width": (
        lambda record: record["text_config"].update(head_dim=8),
        "says heads of 8, and 16 make up the width",
    ),
    "fewer layers": (lambda record: record["text_config"].update(num_hidden_layers=1), "unexpected"),
    "no such heads": (lambda record: record["text_config"].update(num_attention_heads=7), "heads=7 must divide"),
    "no number": (lambda record: record["text_config"].update(intermediate_size="96"), "which is no number"),
    "no vocabulary": (lambda record: record["text_config"].update(vocab_size=[]), "vocab_size = [], which is no"),
    "too large": (lambda record: record["text_config"].update(num_hidden_layers=10**9), "depth must be"),
    "another model": (lambda record: record.update(model_type="llava"), "its model_type is 'llava'"),
    "activation": (lambda record: record["text_config"].update(hidden_act="gelu"), "hidden_act = 'gelu'"),
    "positions": (
        lambda record: record["text_config"].update(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        "rotary positions of the kind 'yarn'",
    ),
    "a size that cannot be drawn": (lambda record: record["vision_config"].update(image_size=9), "pictures of 9 px"),
    "a short context": (
        lambda record: record["text_config"].update(max_position_embeddings=100),
        "a context of 100 places; 4x4 codes and 256 pieces of text take 274",
    ),
    "flow": (lambda record: record.update(vision_gen_enc_config={}), "it is JanusFlow"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_config_that_contradicts_the_weights(
    published: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = WRONG_CONFIGS[case]
    folder = with_config(published, tmp_path / "changed", change)
    assert message in refused([str(folder)], capsys, tmp_path / "out")


def test_what_is_missing_or_hostile(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "config.json is missing" in refused([str(tmp_path / "nowhere")], capsys, out)
    folder = shutil.copytree(published, tmp_path / "copy")
    (folder / "tokenizer.json").write_text("{}")
    assert "no tokenizer of the tokenizers library" in refused([str(folder)], capsys, out)
    (folder / "tokenizer.json").unlink()
    assert "it comes with the weights" in refused([str(folder)], capsys, out)
    shutil.copyfile(published / "tokenizer.json", folder / "tokenizer.json")
    record = json.loads((folder / "tokenizer.json").read_text())
    record["added_tokens"] = [token for token in record["added_tokens"] if "begin_of_image" not in token["content"]]
    (folder / "tokenizer.json").write_text(json.dumps(record))
    assert "it lacks <begin_of_image>" in refused([str(folder)], capsys, out)
    shutil.copyfile(published / "tokenizer.json", folder / "tokenizer.json")
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refused([str(folder)], capsys, out)
    torch.save({"a": _Program(tmp_path / "made")}, folder / "pytorch_model.bin")
    assert "is refused: it asks for" in refused([str(folder)], capsys, out)
    assert not (tmp_path / "made").exists()
    assert "max_text must be" in refused([str(published), "--max-text", "3"], capsys, out)


class _Program:
    """Pickled, this makes a folder when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.target,)


def test_a_program_would_run_where_it_is_not_refused(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Program(tmp_path / "made")))
    assert (tmp_path / "made").exists()


# drawing with it


def test_a_prompt_that_is_too_long_or_holds_marks(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt that is cut would lose the end of the template."""
    call = ["generate", "--model", str(imported), "-o", str(tmp_path / "drawn")]
    assert run([*call, "word " * 80]) == 2
    assert "pieces of text with its template, and this model reads 256: shorten it" in one_error(capsys)
    assert run([*call, "a <begin_of_image> b"]) == 2
    assert "holds '<begin_of_image>', a mark" in one_error(capsys)
    assert not (tmp_path / "drawn").exists()


def test_too_little_memory_says_what_would_fit(
    imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import generation.drawing.memory as memory

    pipeline = load(imported, device="cpu", dtype="float32")
    needs = {
        name: plan_drawing(
            pipeline.generator.config, pipeline.tokenizer.config, dtype, "cpu", eight_bits=name == "int8",
            options=pipeline.config.default_sampling,
        ).total
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("int8", torch.float32))
    }  # fmt: skip
    assert needs["bfloat16"] < needs["float32"]
    monkeypatch.setattr(memory, "available_bytes", lambda device: needs["float32"] - 1)
    call = ["generate", "--model", str(imported), "-o", str(tmp_path / "drawn"), "--dtype", "float32", PROMPT]
    assert run(call) == 2
    assert "--dtype bfloat16 (" in one_error(capsys)


def test_the_plan_of_a_picture_holds() -> None:
    config = VQ16Config(channels=32, multipliers=[1, 1, 2], residual_blocks=1, latent=32, codebook_size=64)
    tokenizer = VQ16(config).eval()
    with LiveMemory() as measured:
        tokenizer.decode(torch.zeros(1, 16, 16, dtype=torch.int64))
    assert 0.8 < measured.peak / decoding_bytes(config, (16, 16)) <= 1.1


def test_published_sizes_are_planned() -> None:
    """Janus-Pro-1B in bfloat16 on a GPU takes 3.4 GB, in int8 under 2.5; the 7B in int8 fits a card of 12 GB."""
    from generation.rows.frame import PromptFrame
    from generation.transformer.config import TransformerConfig

    sizes: dict[str, Any] = {
        "norm_eps": 1e-6,
        "position": "rotary_1d",
        "qk_norm": False,
        "tie_embeddings": False,
        "image_head": "mlp",
    }
    common: dict[str, Any] = {
        "num_image_codes": 16384,
        "num_text_pieces": 102400,
        "max_text": 256,
        "grid": (24, 24),
        "block_rows": 2,
    }
    frame = PromptFrame("marks", 100000, 100003, 100002)
    small = TransformerConfig(width=2048, depth=24, heads=16, mlp_width=5632, frame=frame, **sizes, **common)
    large = TransformerConfig(width=4096, depth=30, heads=32, mlp_width=11008, frame=frame, **sizes, **common)
    plans = {
        (name, eight_bits): plan_drawing(config, VQ16Config(), torch.bfloat16, "cuda", eight_bits=eight_bits).total
        for name, config in (("1B", small), ("7B", large))
        for eight_bits in (False, True)
    }
    assert 3.0e9 < plans["1B", False] < 4.0e9
    assert plans["1B", True] < 2.6e9
    assert plans["7B", True] < 10e9 < plans["7B", False] < 15.5e9


def test_the_layouts_name_the_same_template(published: Path, tmp_path: Path) -> None:
    original = as_original(published, tmp_path / "Janus-Pro-1B")
    pipeline = load(import_janus(original, tmp_path / "model", JanusImport()), device="cpu")
    assert pipeline.text.template == TEMPLATES["pro"]  # type: ignore[union-attr]
