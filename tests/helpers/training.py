"""A small regression for tests of the training loop."""

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from vqvae.training.config import LoopConfig
from vqvae.training.loop import Loop
from vqvae.training.stored import StoredFolder
from vqvae.training.task import Task


class Regression:
    """Linear regression on data that the step number decides; `broken` names a step whose target is not finite."""

    def __init__(self, config: LoopConfig, broken: dict[int, float] | None = None) -> None:
        self.config, self.broken = config, broken or {}
        self.steps: list[int] = []

    def __call__(self, step):
        self.steps.append(step)
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(self.config.batch_size, 4, generator=generator)
        targets = inputs @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]])
        if step in self.broken:
            targets[1] = self.broken[step]
        ids = [f"step {step} sample {index}" for index in range(len(inputs))]
        size = self.config.batch_size // self.config.accumulate
        for start in range(0, len(inputs), size):
            end = start + size
            yield (inputs[start:end], targets[start:end]), ids[start:end]


def loss_of(model, batch):
    error = model(batch[0]).float() - batch[1]
    return {"loss": error.square().mean(), "absolute": error.abs().mean()}


def make_loop(out, broken=None, evaluate=None, model=None, **changes) -> Loop:
    settings = {
        "steps": 12, "batch_size": 8, "learning_rate": 0.05, "warmup": 2, "log_every": 4, "eval_every": 6,
        "save_every": 5, "precision": "float32", "device": "cpu",
    }  # fmt: skip
    config = LoopConfig(**{"out": str(out), **settings, **changes})
    torch.manual_seed(config.seed)
    # dropout draws random numbers, whose state a resume must restore
    model = model or nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    batches = Regression(config, broken)
    task = Task(model, batches, loss_of, evaluate or (lambda model, step: {}), "part", lambda model, folder: None)
    return Loop(config, task, torch.device("cpu"))


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def read_log(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


class Dropped(Headed):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.2, self.training))


def old_state(loop: Loop) -> dict:
    """What `checkpoint.pt` of older versions holds of a run, in their format: moments by place, not by name."""

    def moments(optimizer):
        state = optimizer.state_dict()
        for group in state["param_groups"]:
            del group["param_names"]
        return state

    opponent = loop.opponent
    return {
        "progress": vars(loop.progress).copy(),
        "model": loop.model.state_dict(),
        "average": loop.average.state_dict() if loop.average is not None else None,
        "optimizers": [moments(optimizer) for optimizer in loop.optimizers],
        "random": [{"cpu": torch.get_rng_state(), "cuda": None}],
        "opponent": opponent and {"model": opponent.model.state_dict(), "optimizer": moments(opponent.optimizer)},
        "origin": loop.task.origin,
    }


def write_old(loop: Loop, **changes) -> None:
    """Let the folder of a run hold `checkpoint.pt` instead of what is there."""
    shutil.rmtree(loop.out / "checkpoints", ignore_errors=True)
    loop.out.mkdir(exist_ok=True)
    torch.save(old_state(loop) | changes, loop.out / "checkpoint.pt")


def kept(out) -> Path:
    """The folder of the last checkpoint of a run."""
    return out / "checkpoints" / (out / "checkpoints" / "latest").read_text().strip()


def kept_tensors(out) -> dict[str, torch.Tensor]:
    """The tensors of the last checkpoint of a run, whole."""
    stored = StoredFolder(kept(out))
    tensors = {
        name: torch.zeros(shape, dtype=torch.uint8 if name.startswith("random") else torch.float32)
        for name, shape in stored.shapes.items()
        if not name.endswith(("num_batches_tracked", "n_averaged"))
    }
    stored.read(tensors)
    return tensors
