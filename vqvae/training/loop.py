"""The training loop that every model of ours shares.

bf16 autocast over float32 weights, warm-up and cosine, gradient accumulation and clipping, an average of the weights
(EMA), a log, atomic checkpoints and resuming, on one process or many (torchrun, DDP).
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data.config import ConfigError
from vqvae.training.checkpoints import Checkpointer, FolderCheckpointer
from vqvae.training.config import LoopConfig, ParallelConfig, TrainingError
from vqvae.training.log import Means, Progress, RunLog
from vqvae.training.opponent import OpponentTraining
from vqvae.training.optimizers import build_optimizers, learning_rate_factor
from vqvae.training.process import AXES, Termination, TrainingProcess, distributed, mesh, print_once, rank, world_size
from vqvae.training.sharding import Layout, WholeModel
from vqvae.training.state import RunState
from vqvae.training.stored import Stored
from vqvae.training.task import Task


def train_model(
    config: LoopConfig,
    build: Callable[[torch.device], Task],
    resume: bool = False,
    parallel: ParallelConfig | None = None,
) -> Path:
    """A whole training, from the seed to the saved part; returns the folder of the part, and prints it.

    `build(device)` makes the task once the seed is set and the processes know one another. Raises `TrainingError`,
    `ConfigError` for settings that do not fit, and what `build` raises.
    """
    with TrainingProcess(config, parallel) as process:
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
        self.checkpointer: Checkpointer = checkpointer or FolderCheckpointer(
            self.out, config.keep, config.save_in_background
        )
        layout = self.layout = _layout(task)
        self.model = task.model
        self.whole = WholeModel.of(self.model, layout)
        # FSDP's parameters cannot be copied, so the average is copied first and then shared out in the same way
        average = AveragedModel(self.model, multi_avg_fn=_average_by(config.ema)) if config.ema else None
        layout.apply(self.model, device)
        if average is not None:
            layout.apply(average.module, device)
            average.to(device)
        self.average = average
        self.wrapped: nn.Module = self.model
        if distributed() and not layout.sharded:
            self.wrapped = DistributedDataParallel(self.wrapped, broadcast_buffers=False)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizers = build_optimizers(self.model, config, task.rates, layout)
        self.opponent = OpponentTraining(config, task.opponent, device) if task.opponent is not None else None
        self.state = RunState(layout, self.model, average, self.optimizers, self.opponent, device)
        self.progress = Progress()

    @property
    def averaged(self) -> nn.Module:
        """The model to evaluate and ship: the EMA of the weights, or the weights. Whole on every process.

        Where processes share out the weights, all must ask for it.
        """
        return self.whole.filled(self.model if self.average is None else self.average.module, self.device)

    def run(self, resume: bool = False) -> nn.Module:
        """Train to the end; returns `averaged`. `resume` goes on from the last checkpoint, if there is one.

        Raises `TrainingError` when the folder holds a run already and `resume` is not given, and for a checkpoint that
        is damaged or does not fit.
        """
        if self.checkpointer.exists() and not resume:
            raise TrainingError(f"{self.out} holds a run already; add --resume, or choose another out=")
        self.checkpointer.claim()
        try:
            if self.checkpointer.exists():
                self._restore()
            self._check_same_step()
            self.out.mkdir(parents=True, exist_ok=True)
            with Termination() as termination:
                stopped = self._train(termination)
        finally:
            self.checkpointer.release()
        if stopped:
            signal.raise_signal(stopped)  # again, to whoever had it before: the command leaves with 130 or 143
        return self.averaged

    def _train(self, termination: Termination) -> int:
        """Steps to the end of the run, or to a checkpoint if a process is asked to stop: by which signal, else 0."""
        config = self.config
        started = time.monotonic() - self.progress.seconds
        means, logged = Means(), self.progress
        with closing(RunLog(self.out)) if rank() == 0 else nullcontext() as log:
            while not self._done():
                means.add(self._step(self.progress.step))
                self._advance(time.monotonic() - started)
                self.checkpointer.check()
                step, end = self.progress.step, self._done()
                if asked := self._agree(termination.asked):
                    self._save()
                    self.checkpointer.check(wait=True)
                    return asked
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
        self.checkpointer.check(wait=True)
        return 0

    def _agree(self, asked: int) -> int:
        """The signal by which any process was asked to stop, or 0: all stop after the same step."""
        if not distributed():
            return asked
        highest = torch.tensor(asked, device=self.device)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step: the means over processes of its losses, and the norm of the gradient before clipping."""
        config = self.config
        factor = learning_rate_factor(self._fraction(), step, config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor * group.get("rate", 1.0)
        losses, ids = self._gradients(step)
        self.layout.average_gradients(self.trained)
        norm = self.layout.clip(self.trained, config.clip or math.inf)
        figures = torch.stack([*(value.float() for value in losses.values()), norm.float()])
        if distributed():
            dist.all_reduce(figures)
            figures /= world_size()
        values = dict(zip([*losses, "gradient_norm"], figures.tolist(), strict=True))
        if not all(math.isfinite(values.get(name, 0.0)) for name in ("loss", "gradient_norm", "opponent")):
            raise TrainingError(
                f"loss {values['loss']} and gradient norm {values['gradient_norm']} at step {step}: not finite; "
                f"weights left as they were; samples: {', '.join(ids)}"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.opponent is not None and "opponent" in losses:
            self.opponent.step(factor)
        if self.task.after_step is not None:
            self.task.after_step()
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
            if self.opponent is not None:
                losses |= self.opponent.add_gradients(self._autocast(), index == accumulate - 1)
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value.detach() / accumulate
        return sums, ids

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _update_average(self, step: int) -> None:
        assert self.average is not None
        # a young average follows the weights closely, else it would remember the random start
        decay = min(self.config.ema, (1 + step) / (10 + step))
        self.average.multi_avg_fn = _average_by(decay)
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
        averaged = self.averaged.eval()
        with torch.no_grad(), self._autocast():
            figures = self.task.evaluate(averaged, self.progress.step)
        return {f"test/{name}": value for name, value in figures.items()}

    def _save(self) -> None:
        facts = {**self.state.facts(), "progress": asdict(self.progress), "origin": self.task.origin}
        self.checkpointer.save(self.progress.step, self.state.tensors(), facts)

    def _restore(self) -> None:
        stored = self.checkpointer.load(self.state.orders(), self.state.opponent_order())
        _check_origin(stored, self.task.origin)
        self.state.restore(stored)
        self.progress = Progress(**stored.facts["progress"])
        config = self.config
        print_once(  # these follow the configuration, not the checkpoint
            f"goes on from step {self.progress.step} with learning_rate={config.learning_rate:g}, "
            f"weight_decay={config.weight_decay:g}, betas={config.betas[0]:g},{config.betas[1]:g}"
        )

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


def _average_by(decay: float) -> Callable[[Any, Any, Any], None]:
    """PyTorch's exponential average of lists of tensors, for sharded ones and others apart: no kernel takes both."""
    update = get_ema_multi_avg_fn(decay)

    def update_all(kept: list[Tensor], live: list[Tensor], count: Any) -> None:
        for sharded in (False, True):
            pairs = [pair for pair in zip(kept, live, strict=True) if isinstance(pair[0], DTensor) == sharded]
            if pairs:
                update([pair[0] for pair in pairs], [pair[1] for pair in pairs], count)

    return update_all


def _layout(task: Task) -> Layout:
    """How the mesh shares out the model of a task. Raises `ConfigError` where it cannot."""
    found = Layout(mesh(), task.plans)
    if found.mesh is None:
        return found
    sizes = {axis: found.mesh[axis].size() for axis in AXES}
    if sizes["tensor"] > 1 and "tensor" not in task.plans:
        raise ConfigError(
            f"parallel.tensor={sizes['tensor']}: only a generator's matrices can be shared out; use parallel.shard"
        )
    if sizes["expert"] > 1 and "expert" not in task.plans:
        raise ConfigError(f"parallel.expert={sizes['expert']}: only a generator has experts; use parallel.shard")
    if sizes["expert"] > 1 and sizes["shard"] * sizes["tensor"] > 1:
        raise ConfigError(
            f"parallel.expert={sizes['expert']} goes with parallel.data alone: leave shard and tensor at 1"
        )
    if sizes["shard"] > 1 and task.unshardable:
        raise ConfigError(f"parallel.shard={sizes['shard']}: {task.unshardable}")
    return found


def _check_origin(stored: Stored, origin: dict[str, str]) -> None:
    """Raises `TrainingError` naming what else the stored state was trained with than `origin` says.

    Checkpoints of older versions do not say what they were trained with.
    """
    kept = stored.facts.get("origin")
    for name, value in origin.items():
        if isinstance(kept, dict) and kept.get(name, value) != value:
            raise TrainingError(
                f"{stored} was trained with another {name}; resume with that one, or start anew in another out="
            )
