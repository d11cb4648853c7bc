"""A small regression for tests of the training loop."""

import json

import torch
from torch import nn

from vqvae.training.config import LoopConfig
from vqvae.training.loop import Loop
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
