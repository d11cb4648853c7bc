"""Train a tiny generator in several ways, in turn: `torchrun -m tests.helpers.parallel_training FOLDER JOBS`.

FOLDER is a workspace of `tests.helpers.tiny_codes`; JOBS is JSON, a list of {"name": NAME of the run's folder,
"resume": ..., and settings of `make_config`, of the generator's configuration, or of "parallel"}. The first process
writes FOLDER/NAME.json: the loss and the norm of the gradient of each step, unrounded, and the sums of saved weights.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from generation.training import train_generator
from generation.transformer.model import Transformer
from mmwudao.matching import ContrastiveMatch
from tests.helpers.tiny_codes import make_config
from vqvae.storage.parts import load_part
from vqvae.training.config import ParallelConfig
from vqvae.training.loop import Loop
from vqvae.training.process import rank


def run(workspace: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The losses, norms and weights of one training, or the error that refused it."""
    job = {"steps": 30, "log_every": 30, "eval_every": 30, "save_every": 30, "precision": "float32", **job}
    resume, parallel = job.pop("resume", False), ParallelConfig(**job.pop("parallel", {}))
    whole = {name: job.pop(name) for name in ("checkpoint_gradients", "packing") if name in job}
    objective = ContrastiveMatch() if "match" in job.get("mix", {}) else None
    config = replace(make_config(workspace, workspace / job.pop("name"), **job), parallel=parallel, **whole)
    found: dict[str, Any] = {"loss": [], "gradient_norm": []}
    step = Loop._step

    def recorded(self: Loop, number: int) -> dict[str, float]:
        values = step(self, number)
        for name in ("loss", "gradient_norm"):
            found[name].append(values[name])
        return values

    Loop._step = recorded  # type: ignore[method-assign, assignment]
    try:
        folder = train_generator.train(config, resume, objective=objective)
    except ValueError as error:
        return {"refused": str(error)}
    finally:
        Loop._step = step  # type: ignore[method-assign]
    if rank() == 0:
        model = load_part(Transformer, folder)
        found["weights"] = {name: float(value.double().sum()) for name, value in model.state_dict().items()}
    return found


def main(folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Run the jobs in one group of processes."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for job in jobs:
        name = job["name"]
        out = job.pop("record", name)
        found = run(folder, dict(job))
        if rank() == 0:
            (folder / f"{out}.json").write_text(json.dumps(found))
        if dist.is_initialized():
            dist.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
