"""One of two processes that train a run, break it off, and resume it: `torchrun -m tests.helpers.two_processes FOLDER`.

Each writes FOLDER/RANK.json: the weights and the next random number after the whole run, and after the resumed one.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from data.config import ConfigError
from tests.helpers.training import Dropped, make_loop, weights
from vqvae.training.config import LoopConfig, TrainingError
from vqvae.training.process import TrainingProcess, check_batch_size, distributed, rank


def trained(out: Path, seed: int, broken: dict[int, float] | None = None, resume: bool = False) -> dict[str, Any]:
    """The end of a run whose random numbers start from `seed`."""
    loop = make_loop(out, broken, model=Dropped())
    torch.manual_seed(seed)
    loop.run(resume)
    return {"weights": weights(loop.model).tolist(), "next": float(torch.rand(()))}


def main(folder: Path) -> None:
    """Train three times: a whole run, one that breaks off after its checkpoint, and that one resumed."""
    found: dict[str, Any] = {}
    with TrainingProcess(LoopConfig(device="cpu")):
        number, grouped = rank(), [distributed()]
        try:
            check_batch_size(LoopConfig(batch_size=8, accumulate=3))
        except ConfigError as error:
            found["refused"] = str(error)
        found["whole"] = trained(folder / "whole", 100 + number)
        try:
            trained(folder / "run", 100 + number, broken={7: float("nan")})
        except TrainingError:
            found["resumed"] = trained(folder / "run", 200 + number, resume=True)
    found["grouped"] = [*grouped, distributed()]
    (folder / f"{number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
