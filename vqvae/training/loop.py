"""The training loop that every model of ours shares.

bf16 autocast over float32 weights, warm-up and cosine, gradient accumulation and clipping, an average of the weights
(EMA), a log, atomic checkpoints and resuming, on one process or many (torchrun, DDP).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vqvae.training.checkpoints import (
    Checkpointer,
    FileCheckpointer,
    State,
    check_entries,
    gather_random_states,
    restore_random_state,
)
from vqvae.training.config import LoopConfig, TrainingError
from vqvae.training.log import Means, Progress, RunLog
from vqvae.training.optimizers import build_optimizers, learning_rate_factor
from vqvae.training.process import TrainingProcess, distributed, print_once, rank, world_size
from vqvae.training.task import Task


def train_model(config: LoopConfig, build: Callable[[torch.device], Task], resume: bool = False) -> Path:
    """A whole training, from the seed to the saved part; returns the folder of the part, and prints it.

    `build(device)` makes the task once the seed is set and the processes know one another. Raises `TrainingError`,
    `ConfigError` for settings that do not fit, and what `build` raises.
    """
    with TrainingProcess(config) as process:
        task = build(process.device)
        trained = Loop(config, task, process.device).run(resume)
        folder = Path(config.out) / task.part
        if rank() == 0:
            task.save(trained, folder)
        print_once(str(folder))
    return folder


class Loop:
    """Trains the model of a task on `device`, and keeps the run in `config.out` by way of the checkpointer.

    Raises `TrainingError` at a loss or gradient that is not finite, before the weights are touched, naming the samples.
    """

    def __init__(
        self, config: LoopConfig, task: Task, device: torch.device, checkpointer: Checkpointer | None = None
    ) -> None:
        self.config, self.task, self.device = config, task, device
        self.out = Path(config.out)
        self.checkpointer: Checkpointer = checkpointer or FileCheckpointer(self.out)
        self.model = task.model.to(device)
        self.wrapped: nn.Module = self.model
        if distributed():
            self.wrapped = DistributedDataParallel(self.wrapped, broadcast_buffers=False)
        self.average = None
        if config.ema:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.optimizers = build_optimizers(self.model, config)
        self.progress = Progress()

    @property
    def averaged(self) -> nn.Module:
        """The model to evaluate and ship: the EMA of the weights, or the weights."""
        return self.model if self.average is None else self.average.module

    def run(self, resume: bool = False) -> nn.Module:
        """Train to the end; returns `averaged`. `resume` goes on from the last checkpoint, if there is one.

        Raises `TrainingError` when the folder holds a run already and `resume` is not given, and for a checkpoint that
        is damaged or does not fit.
        """
        config = self.config
        if self.checkpointer.exists():
            if not resume:
                raise TrainingError(f"{self.out} holds a run already; add --resume, or choose another out=")
            self._restore(self.checkpointer.load())
        self._check_same_step()
        self.out.mkdir(parents=True, exist_ok=True)
        started = time.monotonic() - self.progress.seconds
        means, logged = Means(), self.progress
        with closing(RunLog(self.out)) if rank() == 0 else nullcontext() as log:
            while not self._done():
                means.add(self._step(self.progress.step))
                self._advance(time.monotonic() - started)
                step, end = self.progress.step, self._done()
                if step % config.log_every == 0 or end:
                    figures = {f"train/{name}": value for name, value in means.take().items()}
                    figures["learning_rate"] = self.optimizers[0].param_groups[0]["lr"]
                    seconds = self.progress.seconds - logged.seconds
                    figures["samples_per_second"] = (step - logged.step) * config.batch_size / seconds
                    logged = self.progress
                    if log is not None:
                        log.write(self.progress, figures)
                if step % config.eval_every == 0 or end:
                    figures = self._evaluate()
                    if log is not None:
                        log.write(self.progress, figures)
                if step % config.save_every == 0 or end:
                    self._save()
        return self.averaged

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step: the means over processes of its losses, and the norm of the gradient before clipping."""
        config = self.config
        factor = learning_rate_factor(self._fraction(), step, config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
        losses, ids = self._gradients(step)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip if config.clip else math.inf)
        figures = torch.stack([*(value.float() for value in losses.values()), norm.float()])
        if distributed():
            dist.all_reduce(figures)
            figures /= world_size()
        values = dict(zip([*losses, "gradient_norm"], figures.tolist(), strict=True))
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            raise TrainingError(
                f"loss {values['loss']} and gradient norm {values['gradient_norm']} at step {step}: not finite; "
                f"weights left as they were; samples: {', '.join(ids)}"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self._update_average(step)
        return values

    def _gradients(self, step: int) -> tuple[dict[str, Tensor], list[str]]:
        """Add up the gradients of a step's micro-batches; returns the means of their losses, and the samples' ids."""
        self.wrapped.train()
        sums: dict[str, Tensor] = {}
        ids: list[str] = []
        accumulate = self.config.accumulate
        for index, (batch, batch_ids) in enumerate(self.task.batches(step)):
            ids += batch_ids
            # gradients cross processes once a step, with the last micro-batch
            quiet: AbstractContextManager[None] = nullcontext()
            if isinstance(self.wrapped, DistributedDataParallel) and index < accumulate - 1:
                quiet = self.wrapped.no_sync()
            with quiet:
                with self._autocast():
                    losses = self.task.loss_of(self.wrapped, batch)
                (losses["loss"] / accumulate).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value.detach() / accumulate
        return sums, ids

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _update_average(self, step: int) -> None:
        assert self.average is not None
        # a young average follows the weights closely, else it would remember the random start
        decay = min(self.config.ema, (1 + step) / (10 + step))
        self.average.multi_avg_fn = get_ema_multi_avg_fn(decay)
        self.average.update_parameters(self.model)
        for kept, live in zip(self.average.module.buffers(), self.model.buffers(), strict=True):
            kept.copy_(live)

    def _advance(self, seconds: float) -> None:
        if self.config.minutes and distributed():
            # the clock decides when to stop, and all processes must agree on it
            agreed = torch.tensor(seconds, dtype=torch.float64, device=self.device)
            dist.broadcast(agreed, src=0)
            seconds = float(agreed)
        self.progress = Progress(self.progress.step + 1, seconds)

    def _fraction(self) -> float:
        if self.config.minutes:
            return self.progress.seconds / (60 * self.config.minutes)
        return self.progress.step / self.config.steps

    def _done(self) -> bool:
        return self._fraction() >= 1

    def _evaluate(self) -> dict[str, float]:
        self.averaged.eval()
        with torch.no_grad(), self._autocast():
            figures = self.task.evaluate(self.averaged, self.progress.step)
        return {f"test/{name}": value for name, value in figures.items()}

    def _save(self) -> None:
        state = {
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": gather_random_states(self.device),
        }
        self.checkpointer.save(self.progress.step, state)

    def _restore(self, state: State) -> None:
        place = self.checkpointer
        check_entries(state, place)
        if self.average is not None and state["average"] is None:
            raise TrainingError(f"{place} holds no average of the weights; resume with ema=0")
        if len(state["optimizers"]) != len(self.optimizers):
            raise TrainingError(f"{place} was written with another loop.optimizer; resume with that one")
        try:
            self.model.load_state_dict(state["model"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
        except RuntimeError as error:
            raise TrainingError(f"{place} holds a model of another configuration") from error
        try:
            for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(optimizer_state)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise TrainingError(f"{place} holds optimizers of other parameters, as when other parts train") from error
        try:
            restore_random_state(state["random"], self.device)
        except (KeyError, TypeError, RuntimeError) as error:
            raise TrainingError(f"{place} holds no state of the random numbers that PyTorch can take") from error
        self.progress = Progress(**state["progress"])

    def _check_same_step(self) -> None:
        """Every process must go on from the same step: one that sees no checkpoint would start anew beside the rest."""
        if not distributed():
            return
        steps = torch.tensor([self.progress.step, -self.progress.step], device=self.device)
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        if int(steps[0]) != -int(steps[1]):
            raise TrainingError(
                f"the processes start from different steps, up to {int(steps[0])}; "
                f"{self.out} must be one folder that all machines share"
            )
