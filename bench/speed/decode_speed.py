"""Drawing codes, side by side: our engines, Hugging Face `generate()` on the same shape, and the original's way.

    python -m bench.speed.decode_speed [--shape emoji] [--dtype bfloat16] [--batches 1 8] [--runs 3]
    python -m bench.speed.decode_speed --shape 12x512 --batches 1 --contenders auto original --original-steps 64
    python -m bench.speed.decode_speed --shape cogview-4b --device cuda --batches 1 64 \
        --contenders graph compile int8 llama

All have random weights (but `emoji`), the same layers, width, heads, vocabulary and dtype, a prompt as long as the
model's longest text, top-k 100 and, with `--guidance`, classifier-free guidance (ours in one pass with both rows,
Hugging Face's as `guidance_scale`), and draw all codes of a picture. They take turns, `--runs` times, after
a first picture each, whose time is given too: it has the compiling, recording and trying in it. Contenders:

* `auto`, `modules`, `graph`, `compile`: our engines; `int8` is `compile` on a GPU and `auto` elsewhere, with weights of
  8 bits. On a CPU blocks have as many rows as the command gives them, so that a picture has the same bits in every
  batch; `free` is `auto` with exactly as many rows as pictures. On a GPU all have so many.
* `llama`, `gpt2`: Hugging Face's models and `generate()`, with its dynamic cache; `-static` with the static one.
* `original`: CogView's published sampler keeps hidden states and computes the keys and values of all of them again at
  every step. With `--original-steps` so many steps, evenly spread, are run and the time is scaled up.

`CPU s` is the processor time of all threads, the figure to compare where other programs run beside it.

`floor` is the share of what reading weights and cache once a code would take, at the copy bandwidth measured here
(read and written bytes of 512 MiB); weights that fit a CPU's caches may beat it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.cogview.rows import cogview_config
from generation.drawing.decoding import generate_codes
from generation.drawing.engines import Engine
from generation.drawing.logits import draw_noise, sample
from generation.drawing.sampling import SamplingOptions
from generation.rows.draw import training_row
from generation.rows.row import COMMANDS_IN_ROW
from generation.transformer.attention import rotate
from generation.transformer.config import TransformerConfig
from generation.transformer.int8 import quantise
from generation.transformer.model import Attention, Block, Transformer
from mmwudao.loading.devices import DTYPES
from mmwudao.pipeline import load

TOP_K = 100
Draw = Callable[[int], object]  # so many pictures; may return seconds of its own reckoning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="emoji", help="emoji, cogview-4b, cogview-small, or LAYERSxWIDTH")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", default=["auto", "free", "modules", "llama", "llama-static", "gpt2"])
    parser.add_argument("--codes", type=int, help="a side of the picture in codes; default: the model's")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--original-steps", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = build(arguments.shape, arguments.codes).to(arguments.device, DTYPES[arguments.dtype])
    bandwidth = copy_bandwidth(arguments.device)
    record: dict[str, Any] = {
        **vars(arguments), "parameters": sum(p.numel() for p in model.parameters()), "codes": codes_of(model),
        "bandwidth_gb_s": round(bandwidth / 1e9, 1), "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "torch": torch.__version__, "rows": [],
    }  # fmt: skip
    contenders = {name: make(name, model, arguments) for name in arguments.contenders}
    print("batch contender       first s        s    CPU s  ms a code pictures/s  floor  ratio  CPU ratio")
    for batch in arguments.batches:
        times: dict[str, list[float]] = {name: [] for name in contenders}
        processor: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.runs + 1):
            for name, draw in contenders.items():
                before = time.process_time()
                times[name].append(seconds(draw, batch, arguments.device))
                processor[name].append(time.process_time() - before)
        ours = statistics.median(times[arguments.contenders[0]][1:])
        our_processor = statistics.median(processor[arguments.contenders[0]][1:])
        for name, taken in times.items():
            median, busy = statistics.median(taken[1:]), statistics.median(processor[name][1:])
            row = {
                "batch": batch, "contender": name, "first_s": round(taken[0], 3), "s": round(median, 3),
                "cpu_s": round(busy, 3), "cpu_ratio": round(busy / our_processor, 2),
                "ms_a_code": round(1000 * median / codes_of(model), 3),
                "pictures_s": round(batch / median, 3),
                "floor": round(floor_seconds(model, batch, bandwidth, name) / median, 3),
                "ratio": round(median / ours, 2),
            }  # fmt: skip
            record["rows"].append(row)
            print(f"{batch:5} {name:14} {row['first_s']:8.2f} {row['s']:8.3f} {busy:8.3f} {row['ms_a_code']:10.3f} "
                  f"{row['pictures_s']:10.3f} {row['floor']:6.2f} {row['ratio']:6.2f} "
                  f"{row['cpu_ratio']:10.2f}", flush=True)  # fmt: skip
    if arguments.device == "cuda":
        record["gpu"], record["peak_gb"] = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 1e9
    print(json.dumps(record))


def build(shape: str, side: int | None) -> Transformer:
    torch.manual_seed(0)
    if shape == "emoji":
        return load("emoji", "cpu", "float32").generator.eval()
    if shape.startswith("cogview"):
        return Transformer(cogview_config(shape)).eval()
    depth, width = map(int, shape.split("x"))
    side = side or 32
    config = TransformerConfig.modern(
        width=width, depth=depth, heads=max(1, width // 64), max_text=64, grid=(side, side), num_image_codes=8192
    )
    return Transformer(config).eval()


def codes_of(model: Transformer) -> int:
    return model.config.grid[0] * model.config.grid[1]


def seconds(draw: Draw, batch: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    reckoned = draw(batch)
    if device == "cuda":
        torch.cuda.synchronize()
    return reckoned if isinstance(reckoned, float) else time.perf_counter() - started


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written."""
    source = torch.ones(2**27, device=device)
    target = torch.empty_like(source)
    fastest = min(seconds(lambda _: target.copy_(source), 1, device) for _ in range(8))
    return 2 * source.nbytes / fastest


def floor_seconds(model: Transformer, batch: int, bandwidth: float, name: str) -> float:
    """All codes of a batch: each reads the weights of the blocks and the head, and the keys and values so far."""
    config, size = model.config, model.embed.weight.element_size()
    blocks = sum(p.numel() for p in model.blocks.parameters())
    weights = blocks * (1 if name == "int8" else size) + config.num_image_codes * config.width * size
    prompt, codes = config.max_text + COMMANDS_IN_ROW - 1, codes_of(model)
    cached = 2 * config.depth * config.width * size * batch * (prompt + codes / 2)
    return codes * (weights + cached) / bandwidth


def make(name: str, model: Transformer, arguments: argparse.Namespace) -> Draw:
    if name == "original":
        return lambda batch: draw_as_the_original(model, batch, arguments.original_steps)
    if name.startswith(("llama", "gpt2")):
        return hugging_face(name, model, arguments)
    kind = "auto" if name == "free" else name
    if name == "int8":
        model = quantise(copy.deepcopy(model))
        kind = "compile" if arguments.device == "cuda" else "auto"
    text = [i % model.config.num_text_pieces for i in range(model.config.max_text)]
    options = SamplingOptions(top_k=TOP_K, guidance=arguments.guidance)

    def draw(batch: int) -> Tensor:
        images = batch if arguments.device == "cuda" or name == "free" else 0
        engine = Engine(kind, images)  # type: ignore[arg-type]
        return generate_codes(model, [text] * batch, list(range(batch)), options, grid=model.config.grid, engine=engine)

    return draw


def hugging_face(name: str, model: Transformer, arguments: argparse.Namespace) -> Draw:
    import transformers

    config = model.config
    sizes = {"vocab_size": config.vocabulary.padded_size, "bos_token_id": None, "eos_token_id": None}
    kind = getattr(transformers, "LlamaConfig" if name.startswith("llama") else "GPT2Config")
    if name.startswith("llama"):
        sizes |= {
            "hidden_size": config.width, "intermediate_size": config.hidden_width, "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads, "max_position_embeddings": config.max_length,
            "tie_word_embeddings": True,
        }  # fmt: skip
    else:
        sizes |= {
            "n_embd": config.width, "n_layer": config.depth, "n_head": config.heads, "n_positions": config.max_length
        }  # fmt: skip
    with torch.device(arguments.device):
        peer = transformers.AutoModelForCausalLM.from_config(kind(**sizes), dtype=DTYPES[arguments.dtype]).eval()
    cache: dict[str, Any] = {"cache_implementation": "static"} if name.endswith("-static") else {}
    prompt = config.max_text + COMMANDS_IN_ROW - 1
    if arguments.guidance != 1:
        cache |= {"guidance_scale": arguments.guidance}

    def draw(batch: int) -> object:
        tokens = torch.full((batch, prompt), 7, device=arguments.device)
        return peer.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=TOP_K, pad_token_id=0,
            min_new_tokens=codes_of(model), max_new_tokens=codes_of(model), **cache,
        )  # fmt: skip

    return draw


@torch.inference_mode()
def draw_as_the_original(model: Transformer, batch: int, sampled: int) -> float:
    """Seconds for a picture by CogView's published sampler; with `sampled` steps, their mean times all codes."""
    config, device = model.config, model.embed.weight.device
    prompt, codes = config.max_text + COMMANDS_IN_ROW - 1, codes_of(model)
    text = [i % config.num_text_pieces for i in range(config.max_text)]
    row = training_row(config.vocabulary, text, torch.zeros(config.grid), config.max_text, config.position_kind)
    positions = row.positions.to(device)
    noise, options = draw_noise(0, 1, config.num_image_codes).to(device), SamplingOptions(top_k=TOP_K)
    steps = range(codes) if not sampled else [round((k + 0.5) * codes / sampled) for k in range(sampled)]
    longest = torch.randn(batch, prompt + codes, config.width, device=device).to(model.embed.weight.dtype)
    tokens = row.tokens[:1].repeat(batch, 1).to(device)
    started = time.perf_counter()
    for step in steps:
        length = prompt + step - 1  # what the layers have read; the numbers do not matter to the time
        memories = [longest[:, :length]] * config.depth
        hidden, _ = step_as_the_original(model, tokens, positions[: length + 1], memories)
        tokens = sample(model.logits(hidden[:, -1], image_only=True).float(), noise, options)[:, None]
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * codes / len(steps)


def step_as_the_original(
    model: Transformer, tokens: Tensor, positions: Tensor, memories: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Hidden states [B, T, D] of `tokens` [B, T] behind what the layers have read, `memories` [B, M, D] each.

    `positions` [M + T(, 2)] are those of all. A layer norms its memory again, and projects it to queries, keys and
    values with the new tokens (mpu/sparse_transformer.py of the published code). Returns the grown memories too.
    """
    x = model.embed(tokens)
    new, rotation = tokens.shape[1], None
    if model.config.position == "sequence":
        x = x + model.embed_positions[0](positions[-new:])
    elif model.config.position == "learned_2d":
        x = x + sum(table(positions[-new:, axis]) for axis, table in enumerate(model.embed_positions))
    else:
        tables = (model.angles_cos, model.angles_sin)
        cos, sin = (table[positions].flatten(-2)[None, None].to(x.dtype) for table in tables)
        rotation = cos, sin
    grown = []
    for block, memory in zip(model.blocks, memories, strict=True):
        assert isinstance(block, Block)
        everything = torch.cat([memory, x], dim=1)
        grown.append(everything)
        branch = attend_to_memory(block.attention, block.attention_norm(everything), rotation, new)
        x = x + block.attention_out_norm(branch)
        x = x + block.mlp_out_norm(block.mlp(block.mlp_norm(x)))
    return model.norm(x), grown


def attend_to_memory(layer: Attention, x: Tensor, rotation: tuple[Tensor, Tensor] | None, new: int) -> Tensor:
    rows, length, width = x.shape
    q, k, v = layer.qkv(x).view(rows, length, 3, layer.config.heads, -1).transpose(1, 3).unbind(2)
    q, k = layer.q_norm(q), layer.k_norm(k)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    mask = torch.ones(new, length, dtype=torch.bool, device=x.device).tril(length - new)
    y = F.scaled_dot_product_attention(q[:, :, -new:], k, v, mask)
    return layer.project(y.transpose(1, 2).reshape(rows, new, width))


if __name__ == "__main__":
    main()
