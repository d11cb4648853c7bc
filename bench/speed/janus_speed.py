"""Drawing with Janus' shapes and random weights, beside transformers' own `generate` of the same model.

    python -m bench.speed.janus_speed [--size 1b] [--layers 3 8] [--steps 12]
    python -m bench.speed.janus_speed --size 7b --layers 1 2

Guidance 5, one picture: two rows a step. A model of the published depth does not fit every machine's time, so a step is
timed in the middle of a picture (288 codes of 576 are given) with each number of `--layers`, and **scaled**: what
a layer takes is the slope between them, and the rest is there once. The layers must not fit the CPU's caches. Of
`--steps` steps the quietest counts, in wall time and in processor time of all threads, the figure to compare where
other programs run beside it. The text has 1,000 pieces instead of 102,400, which no step reads.

`floor` is the share of what reading weights and cache once a step would take, at the copy bandwidth measured here.
`picture` is the decoder of VQ-16 at its published size, once. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.speed.decode_speed import copy_bandwidth
from generation.drawing.decoding import generate_codes
from generation.drawing.engines import Engine
from generation.drawing.memory import plan_drawing
from generation.drawing.sampling import SamplingOptions
from generation.rows.frame import PromptFrame
from generation.transformer.config import TransformerConfig
from generation.transformer.int8 import quantise
from generation.transformer.model import Transformer
from mmwudao.loading.devices import DTYPES
from vqvae.vq16 import VQ16, VQ16Config

SIZES: dict[str, dict[str, Any]] = {
    "1b": {"width": 2048, "depth": 24, "heads": 16, "mlp_width": 5632},
    "7b": {"width": 4096, "depth": 30, "heads": 32, "mlp_width": 11008},
}
PIECES, SIDE, PROMPT, GUIDANCE = 1000, 24, 30, 5.0
GIVEN = SIDE * SIDE // 2
Times = list[tuple[float, float]]  # wall and processor time at the end of each step


class _Enough(Exception):
    """So many steps have been timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b", choices=SIZES)
    parser.add_argument("--layers", type=int, nargs=2, default=[3, 8], metavar=("FEW", "MORE"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth(arguments.device)
    depth, rows = SIZES[arguments.size]["depth"], list[dict[str, Any]]()
    print(f"bandwidth {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print("contender                ms a step  CPU ms  of it once  s a picture  floor  plan GB")
    for name in arguments.contenders:
        few, more = (measured(name, arguments, layers) for layers in arguments.layers)
        span = arguments.layers[1] - arguments.layers[0]
        wall, busy = ((b - a) / span for a, b in zip(few, more, strict=True))
        once = [value - layer * arguments.layers[0] for value, layer in zip(few, (wall, busy), strict=True)]
        step, processor = once[0] + wall * depth, once[1] + busy * depth
        row = {
            "contender": name, "ms_a_step": round(1e3 * step, 1), "cpu_ms": round(1e3 * processor, 1),
            "ms_once": round(1e3 * once[0], 1), "s_a_picture": round(step * SIDE * SIDE, 1),
            "floor": round(step_bytes(name, arguments.size) / bandwidth / step, 2),
            "plan_gb": round(planned(name, arguments) / 1e9, 2),
        }  # fmt: skip
        rows.append(row)
        print(f"{name:24} {row['ms_a_step']:9} {row['cpu_ms']:7} {row['ms_once']:11} {row['s_a_picture']:12} "
              f"{row['floor']:6} {row['plan_gb']:8}", flush=True)  # fmt: skip
    decoded = decoder_seconds(arguments.device)
    print(f"picture {decoded[0]:.2f} s, {decoded[1]:.2f} CPU s")
    record = {**vars(arguments), "bandwidth_gb_s": round(bandwidth / 1e9, 1), "threads": torch.get_num_threads(),
              "torch": torch.__version__, "load": round(os.getloadavg()[0], 1), "rows": rows,
              "picture_s": round(decoded[0], 2), "picture_cpu_s": round(decoded[1], 2)}  # fmt: skip
    print(json.dumps(record))


def shape(size: str, depth: int) -> TransformerConfig:
    return TransformerConfig(
        **{**SIZES[size], "depth": depth}, num_image_codes=16384, num_text_pieces=PIECES, max_text=256,
        grid=(SIDE, SIDE), norm_eps=1e-6, position="rotary_1d", qk_norm=False, tie_embeddings=False, image_head="mlp",
        frame=PromptFrame("marks", 1, 2, 3), block_rows=2,
    )  # fmt: skip


def measured(name: str, arguments: argparse.Namespace, depth: int) -> tuple[float, float]:
    """Seconds of the quietest step: wall and processor time."""
    torch.manual_seed(0)
    times: Times = []
    CONTENDERS[name](name, arguments, depth, times)
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(times[1:], times[2:], strict=False)]  # the first warms up
    return min(wall for wall, _ in spans), min(busy for _, busy in spans)


def note(times: Times, device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    times.append((time.perf_counter(), time.process_time()))


@torch.no_grad()
def draw_ours(name: str, arguments: argparse.Namespace, depth: int, times: Times) -> None:
    model = Transformer(shape(arguments.size, depth)).eval()
    dtype, _, engine = name.partition("+")
    if dtype == "int8":
        quantise(model, torch.device(arguments.device), torch.bfloat16)
    else:
        model.to(arguments.device, DTYPES[dtype])
    given = torch.randint(16384, (1, SIDE * SIDE))
    given[:, GIVEN:] = -1

    def on_token(step: int, codes: Tensor) -> None:
        note(times, arguments.device)
        if step > arguments.steps + 2:
            raise _Enough

    try:
        generate_codes(
            model, [[7] * PROMPT], [0], SamplingOptions(guidance=GUIDANCE), grid=(SIDE, SIDE),
            given_codes=given.view(1, SIDE, SIDE), on_token=on_token, engine=Engine(engine or "auto"),  # type: ignore[arg-type]
        )  # fmt: skip
    except _Enough:
        return


@torch.no_grad()
def draw_theirs(name: str, arguments: argparse.Namespace, depth: int, times: Times) -> None:
    from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig, LogitsProcessorList
    from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

    sizes, steps = SIZES[arguments.size], arguments.steps + 3
    text = LlamaConfig(
        hidden_size=sizes["width"], intermediate_size=sizes["mlp_width"], num_hidden_layers=depth,
        num_attention_heads=sizes["heads"], vocab_size=PIECES, max_position_embeddings=4096, pad_token_id=3,
        bos_token_id=1, eos_token_id=4,
    )  # fmt: skip
    vision = JanusVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_image_tokens=steps)
    codes: dict[str, Any] = {
        "projection_dim": sizes["width"],
        "image_token_embed_dim": sizes["width"],
        "base_channels": 32,
    }
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=JanusVQVAEConfig(**codes))
    with torch.device(arguments.device):
        model = JanusForConditionalGeneration._from_config(config, dtype=DTYPES[name.partition("-")[2]]).eval()
    model.generation_config.generation_kwargs = {"boi_token_id": 2}
    model.generation_config.pad_token_id, model.generation_config.bos_token_id = 3, 1
    ids = torch.tensor([[1, *[7] * (PROMPT + GIVEN), 2]], device=arguments.device)

    def processor(_: Tensor, scores: Tensor) -> Tensor:
        note(times, arguments.device)
        return scores

    model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_mode="image", guidance_scale=GUIDANCE, do_sample=True,
        logits_processor=LogitsProcessorList([processor]),
    )  # fmt: skip


CONTENDERS: dict[str, Callable[[str, argparse.Namespace, int, Times], None]] = {
    "bfloat16": draw_ours,
    "float32": draw_ours,
    "int8": draw_ours,
    "int8+modules": draw_ours,
    "transformers-bfloat16": draw_theirs,
    "transformers-float32": draw_theirs,
}


def step_bytes(name: str, size: str) -> float:
    """What a step reads: the blocks, the head, and the keys and values of both rows, taken as float32."""
    config = shape(size, SIZES[size]["depth"])
    numbers = config.depth * config.width * (4 * config.width + 3 * config.hidden_width)
    head = config.width * (config.width + config.num_image_codes)
    item = 4 if "float32" in name else 2
    cached = 2 * 2 * config.depth * config.width * (PROMPT + GIVEN) * 4
    return numbers * (1 if name.startswith("int8") else item) + head * item + cached


def planned(name: str, arguments: argparse.Namespace) -> int:
    """The bytes that drawing takes at the published depth and vocabulary."""
    config = shape(arguments.size, SIZES[arguments.size]["depth"])
    config.num_text_pieces = 102400
    dtype, eight = (torch.float32 if "float32" in name else torch.bfloat16), name.startswith("int8")
    options = SamplingOptions(guidance=GUIDANCE)
    return plan_drawing(config, VQ16Config(), dtype, arguments.device, options=options, eight_bits=eight).total


@torch.no_grad()
def decoder_seconds(device: str) -> tuple[float, float]:
    tokenizer, times = VQ16(VQ16Config()).eval().to(device), Times()
    note(times, device)
    tokenizer.decode(torch.randint(16384, (1, SIDE, SIDE), device=device))
    note(times, device)
    return times[1][0] - times[0][0], times[1][1] - times[0][1]


if __name__ == "__main__":
    main()
