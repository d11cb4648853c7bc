"""How to train, whatever the model: the settings of the loop, with their help and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data.options import COUNT, check_options, option


class TrainingError(ValueError):
    """Training cannot go on; the message is one line that says why."""


@dataclass
class ParallelConfig:
    """How processes share out a training, as the axes of a mesh; their product is the number of processes.

    Raises `ValueError` for a number outside the limits of its field.
    """

    data: int = option(
        0, "Copies of the model, each of which takes its share of the batch; 0: as many as there are processes for.",
        least=0, most=2**20,
    )  # fmt: skip
    shard: int = option(
        1, "Processes that share out the weights, gradients and moments of a copy, and the batch too (FSDP2).",
        least=1, most=2**20,
    )  # fmt: skip
    tensor: int = option(
        1, "Processes that share out each matrix of a generator's blocks and see the same batch.", least=1, most=1024
    )
    expert: int = option(
        1, "Processes that share out the experts of a generator, and the batch too; goes with data alone.",
        least=1, most=4096,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class LoopConfig:
    """How to train, whatever the model. `batch_size` counts samples per optimizer step over all processes.

    Raises `ValueError` for a number outside the limits of its field.
    """

    out: str = option("runs/run", "The folder of the run: its log, sample sheets, checkpoint and the trained part.")
    steps: int = option(1000, "Optimizer steps of the run, unless `minutes` is given.", least=1, most=COUNT)
    batch_size: int = option(
        32, "Samples per optimizer step, over all processes and micro-batches.", least=1, most=2**24
    )
    accumulate: int = option(1, "Micro-batches per optimizer step and process.", least=1, most=2**16)
    learning_rate: float = option(1e-3, "The learning rate after the warm-up.", least=0, most=2**16)
    warmup: int = option(100, "Steps in which the learning rate rises linearly from 0.", least=0, most=COUNT)
    final_ratio: float = option(0.05, "The learning rate of the last step, as a share of the highest.", least=0, most=1)
    # muon: Jordan et al. 2024, see `vqvae.training.optimizers`
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest."
    )
    muon_dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto", "Muon orthogonalises in this type; auto is bfloat16, or float32 on a CPU where a trial finds it faster."
    )
    fused: bool = option(True, "Run AdamW's step in one kernel; false leaves the choice to PyTorch.")
    betas: tuple[float, float] = option(
        (0.9, 0.95), "AdamW's decay rates of the two moments of the gradient.", least=0, below=1
    )
    weight_decay: float = option(
        0.01, "Decoupled weight decay of matrices; biases and norms have none.", least=0, most=100
    )
    clip: float = option(1.0, "The largest norm of the gradient; 0 does not clip.", least=0, most=1e9)
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
    log_every: int = option(50, "Steps between two lines of the log; the last step has one, too.", least=1, most=COUNT)
    eval_every: int = option(
        500, "Steps between two evaluations on the held-out splits; one is at the end.", least=1, most=COUNT
    )
    save_every: int = option(500, "Steps between two checkpoints; one is at the end.", least=1, most=COUNT)
    keep: int = option(1, "Keep this many checkpoints, the last ones.", least=1, most=COUNT)
    save_in_background: bool = option(
        True, "Write a checkpoint while training goes on, from a copy in the computer's memory."
    )
    minutes: float = option(
        0.0,
        "Stop after this much wall time instead of after `steps`; the learning rate follows the clock.",
        least=0,
        most=10**7,
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where to train; auto takes a CUDA device if there is one.")

    def __post_init__(self) -> None:
        check_options(self)
