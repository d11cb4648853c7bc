"""The training loop that every model of ours shares.

bf16 autocast over float32 weights, warm-up and cosine, gradient accumulation and clipping, an average of the weights
(EMA), TensorBoard and JSON lines, atomic checkpoints and resuming, on one process or many (torchrun, DDP).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class TrainingError(ValueError):
    """Training cannot go on; the message is one line that says why."""


@dataclass
class LoopConfig:
    """How to train, whatever the model. `batch_size` counts samples per optimizer step over all processes."""

    out: str = "runs/run"
    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1  # micro-batches per optimizer step
    learning_rate: float = 1e-3
    warmup: int = 100  # steps
    final_ratio: float = 0.05  # of the learning rate, at the last step
    # muon: orthogonalised momentum (Jordan et al. 2024) for the matrices of the blocks, AdamW for all else
    optimizer: Literal["adamw", "muon"] = "adamw"
    fused: bool = True  # AdamW in one kernel; false: PyTorch's default
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip: float = 1.0  # gradient norm; 0 = no clipping
    ema: float = 0.0  # decay per step; 0 = no average
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    compile: bool = False  # torch.compile the repeated blocks; pays after a minute or two on a CPU
    seed: int = 0
    log_every: int = 50
    eval_every: int = 500
    save_every: int = 500
    minutes: float = 0.0  # stop (and anneal) by this much wall time instead of by `steps`; 0 = by steps
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.accumulate < 1:
            raise ValueError("steps, batch_size and accumulate must be at least 1")


class Batches(Protocol):
    """The data: micro-batches of one step. `step` and the loop's seed alone decide what is drawn."""

    def __call__(self, step: int) -> Iterator[tuple[Any, list[str]]]:
        """Yield `accumulate` pairs of (this process's part of a micro-batch, the ids of its samples)."""


@dataclass
class Progress:
    """Where training stands: `fraction` of it done (0 to 1), seconds spent so far."""

    step: int = 0
    seconds: float = 0.0


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if distributed() else 1


def setup_device(choice: str) -> torch.device:
    """The device of this process; joins torchrun's process group when there is one."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device=cuda, but PyTorch sees no CUDA device here")
    cuda = choice == "cuda" or (choice == "auto" and torch.cuda.is_available())
    if "RANK" in os.environ and not distributed():
        dist.init_process_group("nccl" if cuda else "gloo")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def learning_rate_factor(fraction: float, step: int, config: LoopConfig) -> float:
    """Linear warm-up, then a cosine from 1 to `final_ratio`; `fraction` of the run done, in 0..1."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
    return config.final_ratio + (1 - config.final_ratio) * cosine


class Loop:
    """Trains `model`: `loss_of(wrapped model, micro-batch)` gives a dict whose "loss" is minimised, the rest logged.

    `evaluate(averaged model, step)` gives the figures of the held-out split. Raises `TrainingError` at a loss or
    gradient that is not finite, before the weights are touched, naming the samples.
    """

    def __init__(
        self,
        config: LoopConfig,
        model: nn.Module,
        batches: Batches,
        loss_of: Callable[[nn.Module, Any], dict[str, Tensor]],
        evaluate: Callable[[nn.Module, int], dict[str, float]],
        device: torch.device,
    ) -> None:
        self.config, self.batches, self.loss_of, self.evaluate = config, batches, loss_of, evaluate
        self.device = device
        self.model = model.to(device)
        self.wrapped: nn.Module = self.model
        if distributed():
            self.wrapped = DistributedDataParallel(self.wrapped, broadcast_buffers=False)
        self.average = None
        if config.ema:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.optimizers = _optimizers(model, config)
        self.progress = Progress()
        self.out = Path(config.out)

    @property
    def averaged(self) -> nn.Module:
        """The model to evaluate and ship: the EMA of the weights, or the weights."""
        return self.model if self.average is None else self.average.module

    def run(self, resume: bool = False) -> nn.Module:
        """Train to the end; returns `averaged`. `resume` goes on from the last checkpoint, if there is one."""
        config = self.config
        if resume and self._checkpoint.is_file():
            self._load()
        elif self._checkpoint.is_file() and rank() == 0:
            raise TrainingError(f"{self.out} holds a run already; add --resume, or choose another out=")
        self.out.mkdir(parents=True, exist_ok=True)
        writer = _writer(self.out) if rank() == 0 else None
        started = time.monotonic() - self.progress.seconds
        sums: dict[str, float] = {}
        counts: Counter[str] = Counter()  # a figure need not come up in every step
        last_log = (self.progress.step, self.progress.seconds)
        while not self._done():
            step = self.progress.step
            figures = self._step(step)
            self.progress = Progress(step + 1, time.monotonic() - started)
            if config.minutes and distributed():
                # the clock decides when to stop, and all processes must agree on it
                seconds = torch.tensor(self.progress.seconds, dtype=torch.float64, device=self.device)
                dist.broadcast(seconds, src=0)
                self.progress.seconds = float(seconds)
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + value
                counts[name] += 1
            step, end = self.progress.step, self._done()
            if step % config.log_every == 0 or end:
                taken = step - last_log[0]
                means = {f"train/{name}": value / counts[name] for name, value in sums.items()}
                means["learning_rate"] = self.optimizers[0].param_groups[0]["lr"]
                means["samples_per_second"] = taken * config.batch_size / (self.progress.seconds - last_log[1])
                self._log(writer, means)
                sums, counts, last_log = {}, Counter(), (step, self.progress.seconds)
            if step % config.eval_every == 0 or end:
                self._log(writer, self._evaluate())
            if step % config.save_every == 0 or end:
                self._save()
        if writer is not None:
            writer.close()
        return self.averaged

    def _step(self, step: int) -> dict[str, float]:
        config = self.config
        factor = learning_rate_factor(self._fraction(), step, config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
        self.wrapped.train()
        sums: dict[str, Tensor] = {}
        ids: list[str] = []
        for index, (batch, batch_ids) in enumerate(self.batches(step)):
            ids += batch_ids
            last = index == config.accumulate - 1
            # gradients cross processes once a step, with the last micro-batch
            quiet: AbstractContextManager[None] = nullcontext()
            if isinstance(self.wrapped, DistributedDataParallel) and not last:
                quiet = self.wrapped.no_sync()
            with quiet:
                with self._autocast():
                    losses = self.loss_of(self.wrapped, batch)
                (losses["loss"] / config.accumulate).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value.detach() / config.accumulate
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip if config.clip else math.inf)
        figures = torch.stack([*(value.float() for value in sums.values()), norm.float()])
        if distributed():
            dist.all_reduce(figures)
            figures /= world_size()
        values = dict(zip([*sums, "gradient_norm"], figures.tolist(), strict=True))
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

    def _fraction(self) -> float:
        if self.config.minutes:
            return self.progress.seconds / (60 * self.config.minutes)
        return self.progress.step / self.config.steps

    def _done(self) -> bool:
        return self._fraction() >= 1

    def _evaluate(self) -> dict[str, float]:
        self.averaged.eval()
        with torch.no_grad(), self._autocast():
            figures = self.evaluate(self.averaged, self.progress.step)
        return {f"test/{name}": value for name, value in figures.items()}

    def _log(self, writer: Any, figures: dict[str, float]) -> None:
        if writer is None:
            return
        step = self.progress.step
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        record = {"step": step, "seconds": round(self.progress.seconds, 1)}
        record.update({name: float(f"{value:.6g}") for name, value in figures.items()})
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print("  ".join(f"{name} {value:.5g}" for name, value in record.items()), flush=True)

    @property
    def _checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def _save(self) -> None:
        if rank() != 0:
            return
        state = {
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": torch.get_rng_state(),
        }
        temporary = self._checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self._checkpoint)

    def _load(self) -> None:
        try:
            state = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler meets damage with almost any exception type
            raise TrainingError(f"{self._checkpoint} is damaged; delete it to start anew") from error
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise TrainingError(f"{self._checkpoint} holds a model of another configuration") from error
        if self.average is not None:
            if state["average"] is None:
                raise TrainingError(f"{self._checkpoint} holds no average of the weights; resume with ema=0")
            self.average.load_state_dict(state["average"])
        if len(state["optimizers"]) != len(self.optimizers):
            raise TrainingError(f"{self._checkpoint} was written with another loop.optimizer; resume with that one")
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        torch.set_rng_state(state["random"])
        self.progress = Progress(**state["progress"])


def _optimizers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices of the model's `blocks` and AdamW for the rest.

    Biases and norm weights are not decayed, as usual. Muon's step is scaled to the size of AdamW's ("match_rms_adamw",
    Liu et al. 2025, arXiv:2502.16982, section 2.2), so that one learning rate serves both.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    muon = [name for name in trained if config.optimizer == "muon" and "blocks." in name and trained[name].ndim == 2]
    matrices = [p for name, p in trained.items() if name not in muon and p.ndim > 1]
    vectors = [p for p in trained.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        fused=config.fused or None,
    )
    if not muon:
        return [adamw]
    matrix_optimizer = torch.optim.Muon(
        [trained[name] for name in muon],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [adamw, matrix_optimizer]


def _writer(out: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"))
