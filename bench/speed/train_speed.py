"""Tokens a second and model-FLOPs utilisation (MFU) of training: ours, and Hugging Face's Trainer at the same shape.

    python -m bench.speed.train_speed [--shape emoji] [--variants plain packed peer]
    python -m bench.speed.train_speed --shape 1b --device cuda --variants plain compiled compiled+packed peer

A variant is `plain`, or of these joined by +: packed (rows behind one another, not padded), compiled, checkpointed,
unfused (AdamW), muon, muon-bfloat16, muon-float32. With `peer` first it is the Trainer with SDPA and padded rows,
compiled or checkpointed at will: Llama, or GPT-2 for 4b, which is CogView's shape. All learn the same batches, one
variant after the other, `--rounds` times. Captions are those of `--shards`, drawn as the shipped generator's were;
the codes are random. Real tokens are no padding, and MFU counts them alone (`bench/speed/flops.py`); the peer has
logits over its whole vocabulary everywhere, ours where needed. Memory is the peak: allocated on CUDA, resident on a
CPU. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from bench.speed.flops import peak_flops, real_tokens, training_flops
from data.config import load_config
from data.reading import open_shards
from data.text import TextTokenizer
from generation.rows.describe import caption_row
from generation.rows.draw import training_row
from generation.rows.row import Row, RowBatch, collate, pack
from generation.rows.texts import descriptions, draw_caption
from generation.training.config import GeneratorTrainConfig
from generation.training.train_generator import LossModule
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from generation.transformer.packing import make_packing
from vqvae.training.config import LoopConfig
from vqvae.training.loop import Loop
from vqvae.training.task import Task

CONFIG = Path(__file__).parents[2] / "mmwudao/configs/emoji-generator.yaml"
OPTIONS = {"plain", "packed", "compiled", "checkpointed", "unfused", "muon", "muon-bfloat16", "muon-float32", "peer"}
PEER_OPTIONS = {"peer", "compiled", "checkpointed"}
ROWS = {"tiny": 4, "emoji": 16, "1b": 12, "4b": 8}
WARM_UP = 2  # steps, compilation among them

Steps = Callable[[], None]  # one optimizer step, waited for


@dataclass
class Measured:
    """Of one variant: seconds of each step, the FLOPs of each, and peak memory in MiB."""

    seconds: list[float]
    flops: list[int]
    memory: float


class Memory:
    """Peak memory since this was made, in MiB; NaN where the system does not tell."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now

    def peak(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), float("nan"))


def shape_config(shape: str, layers: int, text: TextTokenizer) -> TransformerConfig:
    """The transformer of a shape; `layers` 0 leaves its depth."""
    large = {"num_image_codes": 8192, "num_text_pieces": 50000, "max_text": 64, "grid": (32, 32)}
    if shape == "emoji":
        shipped = load_config(GeneratorTrainConfig, CONFIG, []).model
        config = replace(shipped, num_image_codes=1024, num_text_pieces=text.vocab_size, grid=(16, 16))
    elif shape == "1b":
        config = TransformerConfig.modern(**large, width=2048, depth=20, heads=16)
    elif shape == "4b":
        config = TransformerConfig.cogview(**large, width=2560, depth=48, heads=40)
    else:
        sizes = {"num_image_codes": 64, "num_text_pieces": text.vocab_size, "width": 32, "depth": 2, "heads": 2}
        config = TransformerConfig.modern(**sizes, grid=(4, 4))
    return replace(config, depth=layers) if layers else config


def draw_rows(config: TransformerConfig, text: TextTokenizer, shards: Path, describe: bool, size: int) -> Iterator[Row]:
    """Rows without end, with real captions and random codes; `size` that describe have as many codes left out."""
    samples = [sample for sample, _ in open_shards(shards, "train")]
    settings = load_config(GeneratorTrainConfig, CONFIG, [])
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    sizes = (config.max_text, config.position_kind)
    given = 1.0
    for number in count():
        sample = rng.choice(samples)
        codes = torch.randint(config.num_image_codes, config.grid, generator=generator)
        if describe:
            if number % size == 0:
                given = rng.uniform(settings.given_codes, 1)
            kept = torch.randperm(codes.numel(), generator=generator).view(config.grid) < given * codes.numel()
            texts = [text.encode(caption) for caption in descriptions(sample)]
            yield caption_row(config.vocabulary, texts, codes, *sizes, given=kept)
        else:
            caption = draw_caption(sample, settings.captions, rng).text
            yield training_row(config.vocabulary, text.encode(caption), codes, *sizes)


def our_steps(
    config: TransformerConfig, options: set[str], batches: list[RowBatch], precision: Any, device: torch.device
) -> Steps:
    """The loop that all our trainings share, step by step."""
    with device:
        model = Transformer(config)
    if "checkpointed" in options:
        model.checkpoint_gradients()
    if "compiled" in options:
        for block in model.blocks:
            block.compile(dynamic=True)
    muon = next((option for option in sorted(options) if option.startswith("muon")), "")
    dtype: Any = muon.partition("-")[2] or "auto"
    settings = LoopConfig(
        steps=10**6, learning_rate=1e-4, precision=precision, fused="unfused" not in options,
        optimizer="muon" if muon else "adamw", muon_dtype=dtype,
    )  # fmt: skip

    def draw(step: int) -> Iterator[tuple[Any, list[str]]]:
        batch = batches[step % len(batches)]
        yield (batch, batch.weights.sum()), []

    def loss_of(wrapped: torch.nn.Module, micro_batch: tuple[RowBatch, torch.Tensor]) -> dict[str, torch.Tensor]:
        batch, total = micro_batch
        # a caption may be empty: bits of text are then not a number, the loss is
        return {"loss": wrapped(batch.to(device), total.to(device))["loss"]}

    task = Task(LossModule(model), draw, loss_of, lambda model, step: {}, "part", lambda model, folder: None)
    loop = Loop(settings, task, device)
    steps = count()
    return lambda: _waited(lambda: loop._step(next(steps)), device)


def peer_model(config: TransformerConfig) -> Any:
    """Llama for SwiGLU, GPT-2 for GELU: as wide and deep, with as many ids."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    vocabulary = config.vocabulary.padded_size
    common: dict[str, Any] = {"vocab_size": vocabulary, "tie_word_embeddings": True, "use_cache": False}
    common["attn_implementation"] = "sdpa"
    if config.mlp == "swiglu":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=config.width, intermediate_size=config.hidden_width, num_hidden_layers=config.depth,
                num_attention_heads=config.heads, max_position_embeddings=config.max_length, **common,
            )
        )  # fmt: skip
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=config.width, n_inner=config.hidden_width, n_layer=config.depth, n_head=config.heads,
            n_positions=config.max_length, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common,
        )
    )  # fmt: skip


def train_peer(
    config: TransformerConfig, options: set[str], batches: list[RowBatch], precision: str, device: torch.device,
    seconds: float,
) -> list[float]:  # fmt: skip
    """Seconds of each step of Hugging Face's Trainer, after the warm-up, until `seconds` have passed."""
    import tempfile

    from torch.utils.data import IterableDataset
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    padding = config.vocabulary.command("[PAD]")
    ends: list[float] = []

    class Rows(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            for step in count():
                tokens = batches[step % len(batches)].tokens
                # no attention mask: padding comes last, so causal rows never see it, and SDPA may take its fast path
                yield {"input_ids": tokens, "labels": tokens.masked_fill(tokens == padding, -100)}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            _waited(lambda: None, device)
            ends.append(time.perf_counter())
            measured = len(ends) - WARM_UP
            control.should_training_stop = measured >= 2 and ends[-1] - ends[WARM_UP - 1] >= seconds

    with device:
        model = peer_model(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=10**6, per_device_train_batch_size=1, learning_rate=1e-4, weight_decay=0.01,
            adam_beta2=0.95, max_grad_norm=1.0, optim="adamw_torch_fused", bf16=precision == "bfloat16",
            use_cpu=device.type == "cpu", activation_checkpointing="checkpointed" in options,
            torch_compile="compiled" in options, logging_strategy="no", save_strategy="no", report_to="none",
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=Rows(), callbacks=[Clock()], data_collator=lambda features: features[0]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.accelerator.free_memory()
    return [end - start for start, end in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)]


def measure(
    config: TransformerConfig, options: set[str], rows: list[list[Row]], precision: str, device: torch.device,
    seconds: float,
) -> Measured:  # fmt: skip
    """Train for about `seconds` after the warm-up."""
    torch.manual_seed(0)
    together = pack if "packed" in options else collate
    batches = [together(config.vocabulary, part) for part in rows]
    flops_config = replace(config, image_softmax="full") if "peer" in options else config
    flops = [training_flops(flops_config, batch).total for batch in batches]
    memory = Memory(device)
    if "peer" in options:
        times = train_peer(config, options, batches, precision, device, seconds)
    else:
        step = our_steps(config, options, batches, precision, device)
        for _ in range(WARM_UP):
            step()
        times = []
        while len(times) < 2 or sum(times) < seconds:
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
    done = [flops[(WARM_UP + number) % len(flops)] for number in range(len(times))]
    return Measured(times, done, memory.peak())


def fitting_layers(config: TransformerConfig, rows: int, checkpointed: bool) -> int:
    """As many layers as the CUDA device should hold: weights, gradients, averages, bfloat16 copies, activations."""
    free = torch.cuda.mem_get_info()[0]
    tokens, vocabulary = rows * config.max_length, config.vocabulary.padded_size
    layer = 18 * config.width * (4 * config.width + (3 if config.mlp == "swiglu" else 2) * config.hidden_width)
    layer += tokens * config.width * (4 if checkpointed else 80)
    rest = 18 * vocabulary * config.width + 12 * tokens * vocabulary  # the peer's logits, their gradient and copies
    return max(1, min(config.depth, int((0.9 * free - rest) / layer)))


def compare(
    config: TransformerConfig, variants: dict[str, set[str]], arguments: argparse.Namespace, text: TextTokenizer
) -> dict[str, Any]:
    """Measure all variants of a shape, print a table, return the record."""
    device, precision = torch.device(arguments.device), arguments.precision
    size = arguments.rows
    endless = draw_rows(config, text, arguments.shards, arguments.describe, size)
    rows = [list(islice(endless, size)) for _ in range(8)]
    padded = [collate(config.vocabulary, part) for part in rows]
    real = [real_tokens(config, batch) for batch in padded]
    peak, source = peak_flops(device, getattr(torch, precision))
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Transformer(config).parameters())
    record: dict[str, Any] = {
        "shape": arguments.shape, "layers": config.depth, "parameters": parameters, "rows": size,
        "tokens_in_batch": padded[0].tokens.numel(), "describe": arguments.describe, "precision": precision,
        "padding": round(1 - sum(real) / sum(batch.tokens.numel() for batch in padded), 4),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "packing": make_packing([1], device, getattr(torch, precision)).kernel,
        "peak_tflops": round(peak / 1e12, 3), "peak_source": source, "threads": torch.get_num_threads(),
        "cores": os.cpu_count(), "torch": torch.__version__, "runs": [],
    }  # fmt: skip
    print(
        f"{arguments.shape}: {config.depth} layers, {parameters / 1e6:.1f} M parameters, {size} rows a batch, "
        f"{100 * record['padding']:.1f} % padding, {precision}, peak {peak / 1e12:.2f} TFLOP/s ({source})"
    )
    print(f"{'variant':24} {'steps':>5} {'tokens/s':>10} {'real/s':>10} {'rows/s':>8} {'MFU':>6} {'MiB':>7}")
    seconds = 60 * arguments.minutes / (len(variants) * arguments.rounds)
    for variant, options in list(variants.items()) * arguments.rounds:
        found = measure(config, options, rows, precision, device, seconds)
        steps, took = len(found.seconds), sum(found.seconds)
        at = [(WARM_UP + number) % len(rows) for number in range(steps)]
        tokens = real if "packed" in options else [batch.tokens.numel() for batch in padded]
        row = {
            "variant": variant,
            "steps": steps,
            "tokens_per_s": round(sum(tokens[i] for i in at) / took, 1),
            "real_tokens_per_s": round(sum(real[i] for i in at) / took, 1),
            "rows_per_s": round(steps * size / took, 2),
            "mfu": round(sum(found.flops) / took / peak, 4),
            "peak_mib": round(found.memory),
        }
        record["runs"].append(row)
        print(
            f"{variant:24} {steps:5} {row['tokens_per_s']:10.0f} {row['real_tokens_per_s']:10.0f} "
            f"{row['rows_per_s']:8.2f} {100 * row['mfu']:5.1f}% {row['peak_mib']:7}",
            flush=True,
        )
    return record | {"ratio": ratios(record["runs"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(ROWS), default="emoji")
    parser.add_argument("--variants", nargs="+", default=["plain", "packed", "peer"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="default: float32 on a CPU")
    parser.add_argument("--rows", type=int, help="in a batch")
    parser.add_argument("--layers", type=int, default=0, help="default: the shape's, or as many as fit on CUDA")
    parser.add_argument("--minutes", type=float, default=0.5, help="of measuring, all variants together")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--describe", action="store_true", help="rows that describe pictures (no peer)")
    parser.add_argument("--shards", type=Path, default=Path(__file__).parents[2] / "data/samples/emoji")
    arguments = parser.parse_args()
    variants = {variant: set(variant.split("+")) for variant in arguments.variants}
    for variant, options in variants.items():
        if options - (PEER_OPTIONS if "peer" in options else OPTIONS):
            parser.error(f"unknown variant {variant!r}")
    if arguments.describe and any("peer" in options for options in variants.values()):
        parser.error("the peer has no mask for rows that describe: leave it out of --variants")
    cuda = arguments.device == "cuda"
    arguments.precision = arguments.precision or ("bfloat16" if cuda else "float32")
    arguments.rows = arguments.rows or ROWS[arguments.shape]
    text = TextTokenizer(arguments.shards / "text.model")
    config = shape_config(arguments.shape, arguments.layers, text)
    if cuda and not arguments.layers:
        checkpointed = all("checkpointed" in options for options in variants.values())
        config = replace(config, depth=fitting_layers(config, arguments.rows, checkpointed))
    record = None
    while record is None:
        try:
            record = compare(config, variants, arguments, text)
        except torch.OutOfMemoryError:
            if arguments.layers or config.depth <= 2:
                raise
            config = replace(config, depth=config.depth - 2)
            print(f"out of memory: again with {config.depth} layers")
    print(json.dumps(record))


def ratios(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Real tokens a second of each variant over those of the first that is the peer, each the best of its rounds."""
    best: dict[str, float] = {}
    for run in runs:
        best[run["variant"]] = max(best.get(run["variant"], 0.0), run["real_tokens_per_s"])
    peer = next((variant for variant in best if variant.startswith("peer")), None)
    return {name: round(speed / best[peer], 3) for name, speed in best.items() if name != peer} if peer else {}


def _waited(work: Callable[[], Any], device: torch.device) -> None:
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
