"""Experts that stay in their file: the same pictures with a few of them in memory, under a limit of the system too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.speed.expert_speed import write_random
from data.host_memory import parse_bytes
from generation.drawing.decoding import generate_codes
from generation.drawing.memory import plan_drawing
from generation.drawing.sampling import SamplingOptions
from generation.transformer.config import TransformerConfig
from generation.transformer.expert_memory import (
    PASSING,
    ExpertMemory,
    LayerMemory,
    all_expert_bytes,
    expert_bytes,
    open_generator,
)
from generation.transformer.experts import ExpertOptions
from generation.transformer.model import Transformer
from mmwudao.loading.model_dir import assemble_model, read_model_config
from mmwudao.pipeline import load
from tests.helpers.generators import GRID, PROMPTS, SEEDS, SIZES, make_model
from vqvae.model import VQVAEConfig
from vqvae.storage.parts import ModelError, content_hash, load_part, pack_part, save_part

ROOT = Path(__file__).parents[2]
GUIDED = SamplingOptions(guidance=2.0)
COUNT = 8


def make_part(folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    config = TransformerConfig.modern(**{**SIZES, "depth": 3}, experts=ExpertOptions(COUNT, **options))
    save_part(make_model(config), folder, dtype)
    return folder


def memory_of(model: Transformer) -> ExpertMemory:
    source = model.expert_layers[0].memory
    assert isinstance(source, LayerMemory)
    return source.memory


@pytest.mark.parametrize("options", [{"gate": "switch"}, {"gate": "bias", "shared": 1}], ids=lambda one: one["gate"])
@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_pictures_are_the_same_whatever_is_in_memory(
    tmp_path: Path, options: dict[str, Any], stored: str, dtype: str
) -> None:
    folder = make_part(tmp_path / "part", getattr(torch, stored), **options)
    resident = load_part(Transformer, folder)
    known = content_hash(resident)
    resident = resident.to(getattr(torch, dtype))
    drawn = generate_codes(resident, PROMPTS[:3], SEEDS[:3], GUIDED, grid=GRID)
    one = expert_bytes(resident.config, getattr(torch, dtype))
    for places in (PASSING + 1, 9, 3 * COUNT):
        model, found = open_generator(folder, places * one, getattr(torch, dtype))
        assert found == known
        assert torch.equal(generate_codes(model, PROMPTS[:3], SEEDS[:3], GUIDED, grid=GRID), drawn)
        memory = memory_of(model)
        assert memory.bytes == places * one
        assert len(memory._kept) + len(memory._passing) <= places
        if places == 3 * COUNT:
            assert memory.counts.ahead + memory.counts.waited <= 3 * COUNT, "each is read once"
        else:
            assert memory.counts.ahead > 0, "some were there in time"


def test_the_most_used_stay(tmp_path: Path) -> None:
    folder = make_part(tmp_path / "part")
    one = expert_bytes(load_part(Transformer, folder).config, torch.bfloat16)
    model, _ = open_generator(folder, (PASSING + 2) * one, torch.bfloat16)
    memory = memory_of(model)
    assert memory.places == PASSING + 2
    for _ in range(6):  # one after another, as layers do: what is seldom used does not drive out what is used often
        for expert in (2, 3, 4, 0, 1, 0, 1, 0, 1):
            memory.begin(0, [expert])
            memory.get(0, expert)
    assert set(memory._kept) == {(0, 0), (0, 1)}


def test_each_expert_is_the_files(tmp_path: Path) -> None:
    folder = make_part(tmp_path / "part", torch.float32)
    resident = load_part(Transformer, folder)
    model, _ = open_generator(folder, (PASSING + 1) * expert_bytes(resident.config, torch.float32), torch.float32)
    memory = memory_of(model)
    for layer in (0, 2, 1):
        memory.begin(layer, [5, 6])  # what comes is not what was said
        for expert in (7, 5, 0, 3, 6, 7):
            weights = memory.get(layer, expert)
            assert torch.equal(weights.expand, resident.expert_layers[layer].expand[expert])
            assert torch.equal(weights.project, resident.expert_layers[layer].project[expert])
            assert weights.expand_bias is None


def test_what_cannot_be_done_is_told_in_one_line(tmp_path: Path) -> None:
    folder = make_part(tmp_path / "part")
    with pytest.raises(ValueError, match=r"an expert of this model takes 0\.1 MB, and 4 are the least: give 1MB"):
        open_generator(folder, 100, torch.bfloat16)
    save_part(make_model(TransformerConfig.modern(**SIZES)), tmp_path / "dense")
    with pytest.raises(ModelError, match="has no experts: leave out --expert-memory"):
        open_generator(tmp_path / "dense", 10**6, torch.bfloat16)
    shutil.copytree(folder, tmp_path / "packed")
    pack_part(tmp_path / "packed")
    with pytest.raises(ModelError, match="stored in blocks of 8 bits"):
        open_generator(tmp_path / "packed", 10**6, torch.bfloat16)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-100], content[:100], b"", b"\xff" * 16):
        weights.write_bytes(damaged)
        with pytest.raises(ModelError, match="is missing, truncated or damaged"):
            open_generator(folder, 10**6, torch.bfloat16)


def test_amounts_of_memory() -> None:
    found = [parse_bytes(text) for text in ("256MB", "1.5 GiB", "1000", "2kb")]
    assert found == [256_000_000, 1_610_612_736, 1000, 2000]
    for text in ("", "MB", "12 apples", "-1MB", "0MB"):
        with pytest.raises(ValueError, match="is no amount of memory: write it as 256MB"):
            parse_bytes(text)


def test_the_plan_counts_what_is_in_memory() -> None:
    config = TransformerConfig.modern(**SIZES, experts=ExpertOptions(COUNT))
    whole = plan_drawing(config, VQVAEConfig(), torch.float32, "cpu")
    half = all_expert_bytes(config, torch.float32) // 2
    part = plan_drawing(config, VQVAEConfig(), torch.float32, "cpu", expert_memory=half)
    assert whole.transformer - part.transformer == half
    assert plan_drawing(config, VQVAEConfig(), torch.float32, "cpu", expert_memory=10 * half) == whole


def test_a_model_draws_with_experts_in_its_file(tiny_model_dir: Path, tmp_path: Path) -> None:
    """`load(..., expert_memory=...)`, as the command line and the service call it."""
    dense = load_part(Transformer, tiny_model_dir / "generator")
    torch.manual_seed(0)
    config = TransformerConfig(**{**vars(dense.config), "experts": ExpertOptions(COUNT)})
    save_part(Transformer(config), tmp_path / "generator")
    settings = read_model_config(tiny_model_dir)
    folder = assemble_model(
        tiny_model_dir / "tokenizer", tmp_path / "generator", tiny_model_dir / "text.model", tmp_path / "model",
        name="many", image_size=32, styles=[], languages=["en"], default_sampling=settings.default_sampling,
    )  # fmt: skip
    whole = load(folder, device="cpu", dtype="float32").generate("a red apple", seed=1)[0]
    few = load(folder, device="cpu", dtype="float32", expert_memory="100kB")
    assert few.generate("a red apple", seed=1)[0].tobytes() == whole.tobytes()
    assert few.memory.transformer < load(folder, device="cpu", dtype="float32").memory.transformer
    with pytest.raises(ValueError, match="'lots' is no amount of memory"):
        load(folder, device="cpu", expert_memory="lots")
    with pytest.raises(ModelError, match="has no experts"):
        load(tiny_model_dir, device="cpu", expert_memory="1MB")


LIMITED = """
import json, re, resource, sys
import torch
from pathlib import Path
from generation.drawing.decoding import generate_codes
from generation.drawing.sampling import SamplingOptions
from generation.transformer.expert_memory import open_generator
from generation.transformer.model import Transformer
from tests.helpers.generators import GRID, PROMPTS, SEEDS
from vqvae.storage.parts import load_part

torch.set_num_threads(1)
folder, fifth, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
(torch.ones(4, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)).sum()
taken = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
if kind != "free":
    resource.setrlimit(resource.RLIMIT_DATA, (taken + fifth, taken + fifth))
if kind == "few":
    model, _ = open_generator(folder, fifth // 3, torch.bfloat16)
else:
    model = load_part(Transformer, folder)
codes = generate_codes(model, PROMPTS[:2], SEEDS[:2], SamplingOptions(guidance=2.0), grid=GRID)
print(json.dumps(codes.tolist()))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA holds mapped files on Linux alone")
def test_under_a_limit_of_a_fifth_of_the_experts(tmp_path: Path) -> None:
    """Beside what PyTorch takes when it is imported, the process may have a fifth of the experts' gigabyte."""
    config = TransformerConfig.modern(**SIZES, mlp_width=2048, experts=ExpertOptions(640, "gshard"))
    write_random(config, tmp_path / "part")
    total = all_expert_bytes(config, torch.bfloat16)
    assert total > 1e9

    def run(kind: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", LIMITED, str(tmp_path / "part"), str(total // 5), kind], cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    free, few, all_of_them = run("free"), run("few"), run("whole")
    assert free.returncode == 0, free.stderr[-2000:]
    assert few.returncode == 0, few.stderr[-2000:]
    assert json.loads(few.stdout) == json.loads(free.stdout)
    assert all_of_them.returncode != 0, "the limit holds the resident model back"
