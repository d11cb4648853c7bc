"""Train what is not a generator in processes: `torchrun -m tests.helpers.sharded_trainings JOBS`.

JOBS is a JSON file: a list of [name, kind of training, configuration]. For each the first process writes NAME.json
beside it: the losses of all steps, or the line that refused it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.config import from_dict
from mmwudao.cli.train import training
from vqvae.training.loop import Loop
from vqvae.training.process import rank


def run_training(kind: str, record: dict[str, Any]) -> dict[str, Any]:
    """The losses of one training."""
    module, settings = training(kind)
    config: Any = from_dict(settings, record)
    losses: list[float] = []
    step = Loop._step

    def recorded(self: Loop, number: int) -> dict[str, float]:
        values = step(self, number)
        losses.append(values["loss"])
        return values

    Loop._step = recorded  # type: ignore[method-assign, assignment]
    try:
        if kind == "style":
            from generation.training.train_style import StyleBase
            from mmwudao.pipeline import load

            base = load(config.base, device="cpu", dtype="float32")
            module.train(config, StyleBase(base.generator, base.text, base.config.parts["generator"].hash))
        else:
            module.train(config)
    except ValueError as error:
        return {"refused": str(error)}
    finally:
        Loop._step = step  # type: ignore[method-assign]
    return {"loss": losses}


def main(path: Path) -> None:
    """Run the jobs of a file in one group of processes."""
    dist.init_process_group("gloo")
    for name, kind, record in json.loads(path.read_text()):
        found = run_training(kind, record)
        if rank() == 0:
            (path.parent / f"{name}.json").write_text(json.dumps(found))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
