"""Every training shares out its model with FSDP2, and learns what it learns with whole copies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.config import to_dict
from tests.generation.test_adapters import base_dir, codes, style_config
from tests.helpers.stripes import stripe_shards, train_config
from tests.retrieval.test_train_retrieval import make_config as towers_config
from tests.retrieval.test_train_retrieval import workspace as discs
from tests.retrieval.test_train_text_encoder import config_of as text_encoder_config
from tests.retrieval.test_train_text_encoder import workspace as texts
from vqvae.tokenizer_loss import AdversarialConfig
from vqvae.training.config import ParallelConfig

__all__ = ["base_dir", "codes", "discs", "texts"]  # fixtures
ROOT = Path(__file__).parents[2]
STEPS: dict[str, Any] = {"steps": 6, "eval_every": 6, "save_every": 6, "ema": 0.9, "log_every": 6}


def small(config: Any, base: Path) -> Any:
    loop = replace(config.loop, **STEPS)
    return replace(config, base=str(base), loop=loop)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_shared_out_models_learn_the_same(base_dir, codes, discs, texts, tmp_path):
    shards = stripe_shards(tmp_path / "stripes")
    adversarial = train_config(shards, "", **STEPS)
    adversarial.adversarial = AdversarialConfig(weight=0.5, adaptive=False, start=2, channels=8, layers=2)
    adaptive = replace(adversarial, adversarial=replace(adversarial.adversarial, adaptive=True))
    ways = {
        "tokenizer": ("tokenizer", train_config(shards, "", **STEPS)),
        "adversarial": ("tokenizer", adversarial),
        "clip": ("retrieval", towers_config(discs, Path(), loop=STEPS)),
        "siglip": ("retrieval", towers_config(discs, Path(), objective={"name": "siglip"}, loop=STEPS)),
        "text-encoder": ("text-encoder", text_encoder_config(texts, "", **STEPS)),
        "style": ("style", small(style_config(codes, Path(), {"method": "both"}), base_dir)),
    }
    refused = {
        "adaptive": ("tokenizer", adaptive),
        "moco": ("retrieval", towers_config(discs, Path(), objective={"name": "moco", "queue": 16}, loop=STEPS)),
    }
    jobs: list[tuple[str, str, dict[str, Any]]] = []
    for name, (kind, config) in {**ways, **refused}.items():
        for split, parallel in (("ddp", ParallelConfig()), ("fsdp", ParallelConfig(shard=2))):
            if name in ways or split == "fsdp":
                out = replace(config.loop, out=str(tmp_path / f"{name}-{split}"))
                jobs.append((f"{name}-{split}", kind, to_dict(replace(config, loop=out, parallel=parallel))))
    style = next(record for name, _, record in jobs if name == "style-fsdp")
    split_style = {**style, "parallel": {"tensor": 2}, "loop": {**style["loop"], "out": str(tmp_path / "split")}}
    jobs.append(("style-tensor", "style", split_style))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.helpers.sharded_trainings", str(tmp_path / "jobs.json")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name, _, _ in jobs}
    for name in ways:
        whole, shared = found[f"{name}-ddp"], found[f"{name}-fsdp"]
        assert len(whole["loss"]) == STEPS["steps"]
        assert shared.get("loss") == pytest.approx(whole["loss"], rel=1e-5, abs=1e-6), (name, shared)
    assert "needs the last layer whole" in found["adaptive-fsdp"]["refused"]
    assert "objective.name=clip" in found["moco-fsdp"]["refused"]
    assert "use parallel.shard" in found["style-tensor"]["refused"]
