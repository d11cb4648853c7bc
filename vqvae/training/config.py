"""How to train, whatever the model: the settings of the loop, with their help and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data.options import check_options, option


class TrainingError(ValueError):
    """Training cannot go on; the message is one line that says why."""


@dataclass
class LoopConfig:
    """How to train, whatever the model. `batch_size` counts samples per optimizer step over all processes.

    Raises `ValueError` for a number outside the limits of its field.
    """

    out: str = option("runs/run", "The folder of the run: its log, sample sheets, checkpoint and the trained part.")
    steps: int = option(1000, "Optimizer steps of the run, unless `minutes` is given.", least=1)
    batch_size: int = option(32, "Samples per optimizer step, over all processes and micro-batches.", least=1)
    accumulate: int = option(1, "Micro-batches per optimizer step and process.", least=1)
    learning_rate: float = option(1e-3, "The learning rate after the warm-up.", least=0)
    warmup: int = option(100, "Steps in which the learning rate rises linearly from 0.", least=0)
    final_ratio: float = option(0.05, "The learning rate of the last step, as a share of the highest.", least=0, most=1)
    # muon: Jordan et al. 2024, see `vqvae.training.optimizers`
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest."
    )
    fused: bool = option(True, "Run AdamW's step in one kernel; false leaves the choice to PyTorch.")
    betas: tuple[float, float] = option((0.9, 0.95), "AdamW's decay rates of the two moments of the gradient.")
    weight_decay: float = option(0.01, "Decoupled weight decay of matrices; biases and norms have none.", least=0)
    clip: float = option(1.0, "The largest norm of the gradient; 0 does not clip.", least=0)
    ema: float = option(
        0.0,
        "Decay per step of the moving average of the weights, which is what is saved; 0 keeps none.",
        least=0,
        below=1,
    )
    precision: Literal["bfloat16", "float32"] = option(
        "bfloat16", "The type of the computation (autocast); weights stay in float32."
    )
    compile: bool = option(
        False, "Compile the repeated blocks with torch.compile, which pays after a minute or two on a CPU."
    )
    seed: int = option(0, "The seed of initial weights, batches and dropout.", least=0, most=2**31 - 1)
    log_every: int = option(50, "Steps between two lines of the log.", least=1)
    eval_every: int = option(500, "Steps between two evaluations on the held-out splits.", least=1)
    save_every: int = option(500, "Steps between two checkpoints.", least=1)
    minutes: float = option(
        0.0, "Stop after this much wall time instead of after `steps`; the learning rate follows the clock.", least=0
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where to train; auto takes a CUDA device if there is one.")

    def __post_init__(self) -> None:
        check_options(self)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers of at least 0 and below 1, not {list(self.betas)}")
