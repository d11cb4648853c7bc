"""How an opponent learns beside the model of a task: its gradients, its optimizer, its part of a checkpoint."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vqvae.training.config import LoopConfig, TrainingError
from vqvae.training.optimizers import build_optimizers
from vqvae.training.process import distributed
from vqvae.training.task import Opponent


class OpponentTraining:
    """Trains an opponent by AdamW, without weight decay, in the steps of the loop."""

    def __init__(self, config: LoopConfig, opponent: Opponent, device: torch.device) -> None:
        self.config = replace(config, optimizer="adamw", learning_rate=opponent.learning_rate, weight_decay=0.0)
        self.opponent = opponent
        self.model = opponent.model.to(device)
        self.wrapped: nn.Module = self.model
        if distributed():
            self.wrapped = DistributedDataParallel(self.wrapped, broadcast_buffers=False)
        (self.optimizer,) = build_optimizers(self.model, self.config)

    def add_gradients(self, autocast: AbstractContextManager[Any], last: bool) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch, the `last` of its step or not; its loss, as "opponent", if there is one.

        Every process must be at the same micro-batch.
        """
        quiet: AbstractContextManager[None] = nullcontext()
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            quiet = self.wrapped.no_sync()
        with quiet:
            with autocast:
                loss = self.opponent.loss_of(self.wrapped)
            if loss is None:
                return {}
            (loss / self.config.accumulate).backward()
        return {"opponent": loss}

    def step(self, factor: float) -> None:
        """Take a step at `factor` of the learning rate. Raises `TrainingError` for a gradient that is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(parameters, self.config.clip or math.inf))
        if not math.isfinite(norm):
            raise TrainingError(f"the opponent's gradient has norm {norm}: lower its learning rate")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
