"""What three-region sparse attention saves in training.

    python -m bench.speed.sparse_attention        # half a minute on a CPU

A transformer of one layer, 128 wide, on a row of image codes: the time of forward and backward (median), and the bytes
that are kept for the backward pass, dense and sparse, with the fused kernel and with PB-relax. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer


def measure(tokens: int, pb_relax: float, window: int, runs: int) -> tuple[float, int]:
    """Seconds (median) and bytes kept for one row of `tokens`; `window` 0 is dense."""
    torch.manual_seed(0)
    config = TransformerConfig.cogview(
        num_image_codes=64, num_text_pieces=64, width=128, depth=1, heads=2, max_text=tokens, grid=(1, 1),
        pb_relax=pb_relax, sparse_window=window,
    )  # fmt: skip
    model = Transformer(config).train()
    row, positions = torch.randint(64, (1, tokens)), torch.arange(tokens)[None]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(row, positions)
    kept_bytes = sum(kept.values())
    del hidden
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        model(row, positions).sum().backward()
        times.append(time.perf_counter() - started)
    return statistics.median(times), kept_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1089, 4160])
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    record = []
    print(f"{'tokens':>6} {'kernel':9} {'attention':9} {'seconds':>8} {'kept MB':>8}")
    for tokens in arguments.tokens:
        for kernel, pb_relax in (("fused", 0.0), ("pb_relax", 32.0)):
            for attention, window in (("dense", 0), ("sparse", 64)):
                seconds, kept = measure(tokens, pb_relax, window, arguments.runs)
                row = {"tokens": tokens, "kernel": kernel, "attention": attention}
                record.append(row | {"seconds": round(seconds, 4), "kept_mb": round(kept / 1e6, 1)})
                print(f"{tokens:6} {kernel:9} {attention:9} {seconds:8.3f} {kept / 1e6:8.1f}", flush=True)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
