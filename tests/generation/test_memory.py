"""The memory plan against what is allocated, what a device has left, and the preflight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.config import to_dict
from generation.cogview.rows import cogview_config
from generation.drawing import blocks, decoding, fused_step, memory
from generation.drawing.blocks import cache_shape, full_block
from generation.drawing.decoding import generate_codes
from generation.drawing.memory import available_bytes, check_memory, plan_drawing
from generation.drawing.products import column_product
from generation.drawing.prompts import pad_prompts
from generation.drawing.sampling import SamplingOptions
from generation.transformer.cache import KVCache
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from mmwudao.cli.app import run
from mmwudao.loading.info import describe_model
from mmwudao.pipeline import load
from tests.helpers.live_memory import LiveMemory
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.storage.parts import _empty_part, load_part, save_part, without_weights

TOKENIZER = VQVAEConfig(channels=[32, 64, 192])
SIZES = {"num_image_codes": 1024, "num_text_pieces": 500, "width": 256, "depth": 2, "heads": 4, "max_text": 40}
CONFIGS = {
    "modern": TransformerConfig.modern(**SIZES, grid=(6, 6)),
    "cogview": TransformerConfig.cogview(**SIZES, grid=(6, 6)),
    "relaxed": TransformerConfig.cogview(**SIZES, grid=(6, 6), pb_relax=32.0),
}
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("window", [1, 8])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_plan_is_what_is_alive_at_the_peak(monkeypatch, name, window):
    config = CONFIGS[name]
    model, options = Transformer(config).eval(), SamplingOptions(top_k=50, top_p=0.9, guidance=2.0, window=window)
    # without the trial of small blocks
    monkeypatch.setattr(memory, "_trial_bytes", lambda *_: 0)
    monkeypatch.setattr(decoding, "block_rows", lambda model, *_: full_block(model.config, (6, 6)))
    # MKL's packed matrices have no storage that could be counted; what is counted is as large
    monkeypatch.setattr(fused_step, "make_product", column_product)
    plan = plan_drawing(config, TOKENIZER, torch.float32, "cpu", options=options)
    assert (plan.matrices > 0) == (name == "modern" and window == 1)
    with LiveMemory() as measured:
        generate_codes(model, [[1]], [0], options, grid=(6, 6))
    assert measured.peak == pytest.approx(plan.cache + plan.matrices + plan.noise + plan.activations, rel=0.1)


def test_weights_and_cache_are_exact():
    config = CONFIGS["modern"]
    plan = plan_drawing(config, TOKENIZER, torch.bfloat16, "cuda")
    for found, module in ((plan.transformer, Transformer(config).bfloat16()), (plan.tokenizer, VQVAE(TOKENIZER))):
        tensors = [*module.parameters(), *module.buffers()]
        assert found == pytest.approx(sum(tensor.nbytes for tensor in tensors), abs=8)  # a flag is a byte, not four
    rows = full_block(config, (6, 6))
    _, _, slots, _ = cache_shape(config, rows, (6, 6))
    cache = KVCache(config, torch.zeros(rows, slots, dtype=torch.bool), dtype=torch.bfloat16, device="cpu")
    assert plan.cache == cache.keys.nbytes + cache.values.nbytes
    assert plan_drawing(config, TOKENIZER, torch.bfloat16, "cpu").cache == 2 * plan.cache, "float32 on a CPU"
    assert pad_prompts(config, [[1]] * rows, (6, 6)).hidden.shape == (rows, slots)


def test_decoding_a_picture():
    tokenizer = VQVAE(TOKENIZER).eval()
    with LiveMemory() as measured:
        tokenizer.decode(torch.zeros(1, 16, 16, dtype=torch.int64))
    planned = plan_drawing(CONFIGS["modern"], TOKENIZER, torch.float32, "cpu", grid=(16, 16)).picture
    assert measured.peak == pytest.approx(planned, rel=0.1)


def test_cogviews_four_billion_fit_a_card_of_16_gb():
    config = cogview_config("cogview-4b")
    plan = plan_drawing(config, VQVAEConfig.cogview(), torch.bfloat16, "cuda")
    assert plan.rows == full_block(config, (32, 32)) == 8
    assert plan.transformer == 2 * 3_928_849_920
    assert plan.cache == 2 * 2 * 48 * 8 * 2560 * 1087
    assert plan.total < 13e9, "beside PyTorch and CUDA themselves"
    full = plan.transformer + plan.cache * 2  # with 16 rows
    assert full > 16e9


def test_small_models_draw_in_full_blocks(monkeypatch):
    config = CONFIGS["modern"]
    assert full_block(config, (6, 6)) == blocks.BLOCK_ROWS
    # a limit for six rows of this model: the next smaller half is four
    monkeypatch.setattr(blocks, "MOST_CACHED", 2 * 2 * 6 * 78 * 256)
    assert cache_shape(config, 6, (6, 6)) == (2, 6, 78, 256)
    assert full_block(config, (6, 6)) == 4
    monkeypatch.setattr(blocks, "MOST_CACHED", 1)
    assert full_block(config, (6, 6)) == 2


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_pictures_do_not_depend_on_the_batch_in_smaller_blocks(monkeypatch, guidance):
    monkeypatch.setattr(blocks, "MOST_CACHED", 1)
    torch.manual_seed(0)
    sizes = {"num_image_codes": 32, "num_text_pieces": 50, "width": 32, "depth": 1, "heads": 2, "max_text": 4}
    model = Transformer(TransformerConfig.modern(**sizes, grid=(2, 3))).eval()
    options = SamplingOptions(guidance=guidance)
    steps: list[int] = []
    codes = generate_codes(model, [[1], [2, 3], []], [5, 6, 7], options, grid=(2, 3),
                           on_token=lambda step, _: steps.append(step))  # fmt: skip
    assert steps == list(range(1, decoding.count_steps(3, options, (2, 3), rows=2) + 1))
    alone = generate_codes(model, [[2, 3]], [6], options, grid=(2, 3))
    assert torch.equal(codes[1:2], alone)


# loading


def test_loading_makes_no_second_copy(tmp_path: Path):
    config = TransformerConfig.modern(**SIZES, grid=(6, 6))
    torch.manual_seed(0)
    model = Transformer(config).eval()
    save_part(model, tmp_path / "part", torch.float32)
    with LiveMemory() as measured:
        empty = _empty_part(Transformer, to_dict(config))
    assert all(parameter.is_meta for parameter in empty.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert measured.peak < 1.2 * largest, "one parameter at a time, and only until it is registered"
    loaded = load_part(Transformer, tmp_path / "part")
    # the tables of the positions are not in the file
    assert torch.equal(loaded.angles_cos, model.angles_cos)
    tokens = torch.arange(12).view(1, -1)
    positions = tokens.unsqueeze(-1).expand(-1, -1, 2)
    assert torch.equal(loaded(tokens, positions), model(tokens, positions))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    with torch.no_grad():  # a mapped file is not written to
        loaded.embed.weight.add_(1)
    assert torch.equal(load_part(Transformer, tmp_path / "part").embed.weight, model.embed.weight)
    assert next(Transformer(config).parameters()).device.type == "cpu", "the hook is gone"


def test_nothing_is_imported_to_make_an_empty_module():
    """PyTorch's compiler, which random numbers on the meta device need, takes seconds to import."""
    code = "import sys; from generation.cogview.rows import cogview_config\n"
    code += "from generation.transformer.model import Transformer\n"
    code += "from vqvae.storage.parts import without_weights\nbefore = set(sys.modules)\n"
    code += "with without_weights(): Transformer(cogview_config('cogview-small'))\n"
    code += "print(len([name for name in set(sys.modules) - before if name.startswith('torch')]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 20
    with without_weights():
        frozen = torch.nn.Linear(3, 4).requires_grad_(False)
    assert frozen.weight.shape == (4, 3)
    assert not frozen.weight.requires_grad


# what is left


def test_available_memory_of_this_machine():
    available = available_bytes(CPU)
    assert available is not None
    assert 1e6 < available < 1e14
    assert available_bytes(torch.device("mps")) is None


def test_available_memory_of_a_gpu_counts_what_pytorch_holds_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert available_bytes(torch.device("cuda")) == 1200


def test_too_little_memory_says_what_to_change(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2_000_000_000)
    check_memory(2_000_000_000, CPU, torch.float32)
    with pytest.raises(ValueError, match=r"3\.50 GB more on cpu, where 2\.00 GB are free: use --dtype bf") as caught:
        check_memory(3_500_000_000, CPU, torch.float32)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="use a smaller model or --device cpu$"):
        check_memory(3_500_000_000, torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    check_memory(10**18, CPU, torch.float32)


def test_loading_and_drawing_look_first(tiny_model_dir: Path, tmp_path: Path, monkeypatch, capsys):
    pipe = load(tiny_model_dir, "cpu")
    needed = pipe.memory.total
    monkeypatch.setattr(memory, "available_bytes", lambda device: pipe.memory.working - 1)
    with pytest.raises(ValueError, match="drawing with this model takes"):
        pipe.generate("cat", seed=0)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed - 1)
    assert len(pipe.generate("cat", seed=0)) == 1
    out = tmp_path / "out"
    assert run(["generate", "cat", "--model", str(tiny_model_dir), "--device", "cpu", "-o", str(out)]) == 2
    assert "GB are free: use" in capsys.readouterr().err
    assert not out.exists()


def test_info_prints_the_plan(tiny_model_dir: Path, capsys):
    described = describe_model(tiny_model_dir, "float16")["memory"]
    assert {device: plan["dtype"] for device, plan in described.items()} == {"cpu": "float16", "cuda": "float16"}
    assert run(["info", str(tiny_model_dir)]) == 0
    assert "memory     cuda, bfloat16: 0.00 GB = transformer" in capsys.readouterr().out


def test_info_of_a_preset(capsys):
    assert run(["info", "cogview-4b", "--dtype", "bfloat16", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["parameters"] == 3_928_849_920
    assert record["image_size"] == 256
    assert record["memory"]["cuda"]["total"] < 13e9
    assert run(["info", "cogview-small"]) == 0
    assert "211,958,784 parameters (a preset, no weights here)" in capsys.readouterr().out
    assert run(["info", "cogview-4b", "--dtype", "int4"]) == 2
    assert "unknown dtype 'int4'" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_peak_on_a_gpu(name):
    config = TransformerConfig(**{**vars(CONFIGS[name]), "width": 1024, "depth": 12, "heads": 16, "grid": (16, 16)})
    tokenizer = VQVAEConfig.cogview()
    plan = plan_drawing(config, tokenizer, torch.bfloat16, "cuda")
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = Transformer(config).to("cuda", torch.bfloat16).eval()
    decoder = VQVAE(tokenizer).to("cuda").eval()
    codes = generate_codes(model, [[1]] * 16, list(range(16)), SamplingOptions(top_k=50), grid=(16, 16))
    for one in codes:
        decoder.decode(one[None])
    assert torch.cuda.max_memory_allocated() - start == pytest.approx(plan.total, rel=0.1)
