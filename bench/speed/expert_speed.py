"""Pictures a minute while a share of a generator's experts is in memory, and whether they are the same pictures.

    python -m bench.speed.expert_speed --folder parts/many-experts --pictures 8 --shares 100 50 25 10

Makes a generator with random weights (once, in the folder), draws with all of it resident, and then with each share of
its experts in memory, each in a process of its own. `--limit MB` is set as RLIMIT_DATA (all private memory, that of
PyTorch too; Linux) in all but the resident one. Printed as JSON, a line a process: seconds of the clock and of the CPU,
pictures a minute of each, the most private memory, how often an expert was kept, read ahead or waited for, and whether
the codes are those of the resident model. The file was just written, so it is read from the page cache.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generation.drawing.decoding import generate_codes
from generation.drawing.sampling import SamplingOptions
from generation.transformer.config import TransformerConfig
from generation.transformer.expert_memory import LayerMemory, all_expert_bytes, open_generator
from generation.transformer.experts import ExpertOptions
from generation.transformer.model import Transformer
from vqvae.storage.parts import load_part, without_weights
from vqvae.storage.published import Made, stream_part

DTYPE = torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    for name, size in (("width", 256), ("hidden", 704), ("depth", 6), ("experts", 16), ("grid", 12), ("pictures", 8)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--shares", type=float, nargs="+", default=[100, 50, 25, 10], help="percent")
    parser.add_argument("--limit", type=int, default=0, help="MB of RLIMIT_DATA")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(draw(arguments)))
        return
    config = TransformerConfig.modern(
        num_image_codes=1024, num_text_pieces=1000, width=arguments.width, depth=arguments.depth, heads=4, max_text=8,
        mlp_width=arguments.hidden, grid=(arguments.grid, arguments.grid),
        experts=ExpertOptions(arguments.experts, "switch"),
    )  # fmt: skip
    if not arguments.folder.exists():
        write_random(config, arguments.folder)
    codes = ""
    for share in (0.0, *arguments.shares):
        command = [sys.executable, __file__, *sys.argv[1:], "--child", str(share)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(json.dumps({"percent": share, "failed": done.stderr.strip().splitlines()[-1:]}))
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        codes = codes or found["codes"]
        print(json.dumps({**found, "codes": "same" if found["codes"] == codes else "OTHERS"}), flush=True)


def write_random(config: TransformerConfig, folder: Path) -> None:
    """A generator with random weights: normal, each expert another stretch of the same numbers."""
    with without_weights():
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    torch.manual_seed(0)
    numbers = torch.randn(2**24, dtype=torch.float32).mul_(0.05).to(DTYPE)

    def made(name: str, shape: torch.Size) -> Tensor:
        if len(shape) < 3:
            return torch.ones(shape, dtype=DTYPE) if "norm" in name else torch.randn(shape).mul_(0.1).to(DTYPE)
        size = shape[1:].numel()
        places = torch.randint(len(numbers) - size, (shape[0],)).tolist()
        return torch.stack([numbers[place : place + size].view(shape[1:]) for place in places])

    tensors = {name: Made(tuple(shape), DTYPE, partial(made, name, shape)) for name, shape in shapes.items()}
    stream_part(folder, config, tensors)


def draw(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw in this process; a share of 0 % is the resident model."""
    torch.set_num_threads(1)
    before, share = status("VmData"), arguments.child
    if arguments.limit and share:
        resource.setrlimit(resource.RLIMIT_DATA, (arguments.limit * 10**6, resource.RLIM_INFINITY))
    if share:
        config = TransformerConfig(**json.loads((arguments.folder / "config.json").read_text()))
        total = all_expert_bytes(config, DTYPE)
        model, _ = open_generator(arguments.folder, int(total * share / 100), DTYPE)
    else:
        model = load_part(Transformer, arguments.folder)
        total = all_expert_bytes(model.config, DTYPE)
    prompts, seeds = [[k % 900, 7] for k in range(arguments.pictures)], list(range(arguments.pictures))
    clock, cpu = time.perf_counter(), time.process_time()
    codes = generate_codes(model, prompts, seeds, SamplingOptions(guidance=1.0), grid=model.config.grid)
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    memory = model.expert_layers[0].memory
    return {
        "percent": share or "resident", "experts_mb": total / 1e6, "limit_mb": arguments.limit if share else None,
        "imports_mb": before, "private_mb": status("VmData"), "peak_rss_mb": status("VmHWM"), "seconds": clock,
        "cpu_seconds": cpu, "pictures_a_minute": 60 * arguments.pictures / clock,
        "pictures_a_cpu_minute": 60 * arguments.pictures / cpu,
        **(vars(memory.memory.counts) if isinstance(memory, LayerMemory) else {}),
        "codes": sha256(codes.numpy().tobytes()).hexdigest()[:16],
    }  # fmt: skip


def status(name: str) -> float:
    """MB of this process, as Linux has it."""
    match = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 / 1e6 if match else 0.0


if __name__ == "__main__":
    main()
