"""Does an import refuse what is damaged, in one line? Thousands of hostile checkpoints, each imported in a process.

    python -m bench.load.hostile_imports [--cases 2000] [--seed 0] [--memory 2] [--seconds 20] [--out RECORD.json]

A case is one model (`imported_models.py`) and one way to damage it (`mutations.py`), both drawn from the seed and the
number of the case. A forked process imports it; it may take `--memory` GB beyond what it had before, and `--seconds`.
What comes out is one of:

    refused    an error of ours on one line
    equal      accepted, with the tensors and the configuration of the undamaged import: all numbers are the same
    rounded    as equal, but one tensor was stored in half precision and its numbers are those, rounded
    wrong      accepted, and something differs
    traceback  any other error
    killed     by a signal or by the time limit

The last three must not occur. The exit code is 1 if one did.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from bench.load.imported_models import Model, models
from bench.load.mutations import ROUNDED

BAD = ("wrong", "traceback", "killed")


@dataclass(frozen=True)
class Outcome:
    """What an import did with a damaged model."""

    case: int
    model: str
    damage: str
    result: str
    message: str = ""


def run_case(case: int, seed: int, all_models: list[Model], folder: Path) -> Outcome:
    """Damage a model in `folder` and import it in this process."""
    draw = random.Random(f"{seed} {case}")
    model = all_models[case % len(all_models)]
    place = folder / str(case)
    model.write(place)
    damage = model.damage(place, draw)
    try:
        model.convert(place, place / "imported")
    except ValueError as error:  # ModelError, DataError, ConfigError
        message = str(error)
        ours = type(error) is not ValueError and type(error).__module__.split(".")[0] in ("vqvae", "data")
        known = ours and message.strip() and "\n" not in message and len(message) < 3000
        return Outcome(case, model.name, damage, "refused" if known else "traceback", message[:500])
    except Exception:
        return Outcome(case, model.name, damage, "traceback", traceback.format_exc()[-1500:])
    return Outcome(case, model.name, damage, *_compare(place / "imported", folder / model.name, damage))


def prepare(all_models: list[Model], folder: Path) -> None:
    """Import every model undamaged, for comparison."""
    for model in all_models:
        model.write(folder / "undamaged" / model.name)
        model.convert(folder / "undamaged" / model.name, folder / model.name)


def _compare(found: Path, expected: Path, damage: str) -> tuple[str, str]:
    """The result of an accepted import, and what differs."""
    if (found / "config.json").read_bytes() != (expected / "config.json").read_bytes():
        return "wrong", "another configuration"
    ours, theirs = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    if ours.keys() != theirs.keys():
        return "wrong", "other tensors"
    apart = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    if not apart:
        return "equal", ""
    rounded = damage in ROUNDED and all(torch.allclose(ours[name], theirs[name], 1e-2, 1e-2) for name in apart)
    return ("rounded" if rounded else "wrong"), ", ".join(apart[:3])


def run_limited(case: int, arguments: argparse.Namespace, all_models: list[Model], folder: Path) -> Outcome:
    """`run_case` in a forked process under the limits."""
    answer = folder / f"{case}.json"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + int(arguments.memory * 1e9)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(arguments.seconds)  # its default action ends the process
            answer.write_text(json.dumps(asdict(run_case(case, arguments.seed, all_models, folder))))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    shutil.rmtree(folder / str(case), ignore_errors=True)
    if status == 0:
        outcome = Outcome(**json.loads(answer.read_text()))
        answer.unlink()
        return outcome
    model = all_models[case % len(all_models)]
    return Outcome(case, model.name, "", "killed", f"status {status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="begin with this case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=float, default=2.0, help="GB")
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write every outcome there, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the threads of a pool do not survive a fork
    begun, outcomes = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        folder, all_models = Path(name), models()
        prepare(all_models, folder)
        for case in range(arguments.first, arguments.first + arguments.cases):
            outcome = run_limited(case, arguments, all_models, folder)
            outcomes.append(outcome)
            if len(outcomes) % 100 == 0:
                print(f"{len(outcomes)} cases", flush=True)
            if outcome.result in BAD:
                print(
                    f"case {case}: {outcome.model}, {outcome.damage}: {outcome.result}: {outcome.message}", flush=True
                )
    results = ["refused", "equal", "rounded", *BAD]
    print(f"{'model':24}", *(f"{result:>9}" for result in results))
    for model in [*(model.name for model in all_models), "all"]:
        counts = Counter(outcome.result for outcome in outcomes if model in (outcome.model, "all"))
        print(f"{model:24}", *(f"{counts[result]:9}" for result in results))
    print(f"{len(outcomes)} cases in {time.monotonic() - begun:.0f} s")
    if arguments.out:
        arguments.out.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    raise SystemExit(any(outcome.result in BAD for outcome in outcomes))


if __name__ == "__main__":
    main()
