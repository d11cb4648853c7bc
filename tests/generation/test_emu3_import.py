"""`import emu3`: what is refused in one line, that nothing half-written stays, and that its plan holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from generation.drawing.memory import plan_drawing
from generation.rows.frame import PromptFrame
from generation.transformer.config import TransformerConfig
from tests.helpers.cli import refused_import
from tests.helpers.emu3 import make_emu3, save_emu3
from tests.helpers.live_memory import LiveMemory
from vqvae.movq import MoVQ, MoVQConfig
from vqvae.tokenizers import decoding_bytes

LAYER = "text_model.model.layers.1.mlp.down_proj.weight"
OPTIONS = ["--image-size", "8", "--unwanted", "bad."]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_emu3(make_emu3().bfloat16(), tmp_path_factory.mktemp("emu3") / "Emu3-Gen-hf")


WRONG_WEIGHTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda found: found.pop(LAYER), f"missing: {LAYER}"),
    "unexpected": (lambda found: found.update(stranger=torch.zeros(1)), "unexpected: stranger"),
    "shape": (
        lambda found: found.update({LAYER: torch.zeros(64, 95, dtype=torch.bfloat16)}),
        f"of another shape: {LAYER} [64, 95] instead of [64, 96]",
    ),
    "numbers": (lambda found: found[LAYER].view(-1)[3:4].fill_(float("nan")), f"with NaN or infinite numbers: {LAYER}"),
    "tokenizer": (
        lambda found: found.pop("vqmodel.quantize.embedding.weight"),
        "missing: vqmodel.quantize",
    ),
}
WRONG_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another width": (lambda record: record["text_config"].update(hidden_size=128), "of another shape"),
    "fewer layers": (lambda record: record["text_config"].update(num_hidden_layers=1), "unexpected"),
    "heads of keys": (lambda record: record["text_config"].update(num_key_value_heads=4), "of another shape"),
    "no number": (lambda record: record["text_config"].update(intermediate_size="96"), "which is no number"),
    "context": (lambda record: record["text_config"].update(max_position_embeddings=99), "say fewer (--max-text)"),
    "another model": (lambda record: record.update(model_type="llava"), "its model_type is 'llava', not emu3"),
    "first layout": (lambda record: record.update(model_type="Emu3"), "without its picture tokenizer"),
    "no map": (lambda record: record.pop("vocabulary_map"), "it has no vocabulary_map"),
    "a lost code": (lambda record: record["vocabulary_map"].pop("<|visual token 000007|>"), "names 47 codes"),
    "two codes of one id": (
        lambda record: record["vocabulary_map"].update({"<|visual token 000007|>": 300}), "each with an id of its own",
    ),
    "latent": (lambda record: record["vq_config"].update(double_latent=True), "vq_config.double_latent = True"),
    "levels": (lambda record: record["vq_config"].update(channel_multiplier=[1, 2, 4]), "attention_levels must name"),
    "time": (lambda record: record["vq_config"].update(temporal_downsample_factor=3), "only 2 is computed here"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_wrong_weights_are_named(
    published: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = WRONG_WEIGHTS[case]
    folder = shutil.copytree(published, tmp_path / "changed")
    tensors = load_file(published / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    assert message in refused_import("emu3", [str(folder), *OPTIONS], capsys, tmp_path / "out")


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_config_that_contradicts_the_weights(
    published: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = WRONG_CONFIGS[case]
    folder = shutil.copytree(published, tmp_path / "changed")
    record = json.loads((folder / "config.json").read_text())
    change(record)
    (folder / "config.json").write_text(json.dumps(record))
    options = [*OPTIONS, "--max-text", "80"]
    assert message in refused_import("emu3", [str(folder), *options], capsys, tmp_path / "out")


def test_files_and_options_that_do_not_fit(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, folder = tmp_path / "out", shutil.copytree(published, tmp_path / "copy")
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "config.json is missing"),
        ([str(folder), "--image-size", "9"], "the model cannot draw 9 px: a code stands for 2"),
        ([str(folder), "--image-size", "720"], "say fewer (--max-text)"),
        ([str(folder), "--image-size", "8", "--max-text", "16"], "the text that is not wanted has"),
    ):
        assert message in refused_import("emu3", arguments, capsys, out), message
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "model.safetensors is truncated or damaged" in refused_import("emu3", [str(folder), *OPTIONS], capsys, out)
    record = json.loads((folder / "tokenizer.json").read_text())
    record["added_tokens"] = [one for one in record["added_tokens"] if "extra_200" not in one["content"]]
    (folder / "tokenizer.json").write_text(json.dumps(record))
    assert "it lacks <|extra_200|>" in refused_import("emu3", [str(folder), *OPTIONS], capsys, out)


@pytest.mark.parametrize("multipliers", [[1, 2, 2], [1, 1, 2]])
def test_the_plan_of_a_picture_holds(multipliers: list[int]) -> None:
    config = MoVQConfig(channels=32, multipliers=multipliers, residual_blocks=1, attention_levels=[2], codebook_size=64)
    tokenizer = MoVQ(config).eval()
    with LiveMemory() as measured:
        tokenizer.decode(torch.zeros(1, 16, 16, dtype=torch.int64))
    assert 0.9 < measured.peak / decoding_bytes(config, (16, 16)) <= 1.1


def test_published_sizes_are_planned() -> None:
    """Emu3-Gen in bfloat16 and in int8 on a GPU: one picture, two rows, without gigabytes of noise."""
    config = TransformerConfig(
        num_image_codes=32768, num_text_pieces=151854, width=4096, depth=32, heads=32, kv_heads=8, mlp_width=14336,
        max_text=256, grid=(90, 90), position="rotary_1d", qk_norm=False, tie_embeddings=False, image_head="codes",
        frame=PromptFrame("bare", without="stored", stored=[151849]), row_end=151846, noise="counter", block_rows=2,
    )  # fmt: skip
    plans = [plan_drawing(config, MoVQConfig(), torch.bfloat16, "cuda", eight_bits=eight) for eight in (False, True)]
    assert plans[0].cache == 2 * 32 * 2 * (256 + 2 + 8100 + 89) * 1024 * 2
    assert plans[0].noise < 2e7
    assert 14e9 < plans[0].transformer < 16e9
    assert plans[1].transformer < 9e9
