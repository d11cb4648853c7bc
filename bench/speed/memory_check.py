"""The memory plan against the measured peak of the process (resident set) on the CPU, Linux only.

    python -m bench.speed.memory_check [--model emoji] [--width 512 --depth 12]
    python -m bench.speed.memory_check --janus 2 [--dtype bfloat16 int8]

Each model draws in a process of its own: one that is on disk, and one with random weights. With `--janus LAYERS` it is
a model directory of Janus-1B's widths, vocabularies and picture tokenizer, with so many layers, written to a temporary
folder and loaded from there in each number format. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure(model: str, width: int, depth: int, dtype: str) -> dict[str, object]:
    """Draw a picture; without `model` with random weights, most of its codes given."""
    import torch

    from generation.drawing.decoding import generate_codes
    from generation.drawing.memory import plan_drawing
    from generation.drawing.sampling import SamplingOptions
    from generation.transformer.config import TransformerConfig
    from generation.transformer.model import Transformer
    from mmwudao.pipeline import load
    from vqvae.model import VQVAE, VQVAEConfig

    torch.ones(512, 512) @ torch.ones(512, 512)  # the libraries' own buffers
    if model:
        before = resident("VmRSS")
        pipe = load(model, device="cpu", dtype=dtype)
        plan = pipe.memory
        pipe.generate("a red apple", n=1, seed=0, sampling={"guidance": 2.0})
    else:
        before = resident("VmRSS")
        config = TransformerConfig.modern(width=width, depth=depth, heads=width // 64, max_text=48, grid=(16, 16))
        generator, tokenizer = Transformer(config).eval(), VQVAE(VQVAEConfig()).eval()
        given = torch.zeros(1, 16, 16, dtype=torch.int64)
        given.flatten(1)[:, 250:] = -1
        generate_codes(generator, [[1]], [0], SamplingOptions(), given_codes=given)
        plan = plan_drawing(config, tokenizer.config, torch.float32, "cpu", given=250)
    peak = resident("VmHWM")
    return {
        "model": model or f"random, {width} wide, {depth} layers",
        "dtype": dtype,
        "before_mb": round(before / 1e6),
        "planned_mb": round((before + plan.total) / 1e6),
        "peak_mb": round(peak / 1e6),
        "ratio": round((before + plan.total) / peak, 3),
        "ratio_above_before": round(plan.total / max(1, peak - before), 3),
    }


def write_janus(folder: Path, layers: int) -> None:
    """A model directory with random weights in bfloat16."""
    from dataclasses import replace

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    from bench.speed.janus_speed import shape
    from data.framed_text import PROMPT, framed_text_file, load_model_text
    from generation.drawing.sampling import SamplingOptions
    from generation.transformer.model import Transformer
    from mmwudao.loading.model_dir import ModelConfig, Part, write_model_config
    from vqvae.storage.parts import save_part
    from vqvae.vq16 import VQ16, VQ16Config

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    config = replace(shape("1b", layers), num_text_pieces=102400)
    (folder / "text.json").write_bytes(framed_text_file(json.loads(pieces.to_str()), PROMPT, config.num_text_pieces))
    hashes = {"text": load_model_text(folder / "text.json").content_hash}
    torch.manual_seed(0)
    hashes["tokenizer"] = save_part(VQ16(VQ16Config()), folder / "tokenizer", torch.float32)
    config = replace(config, tokenizer_hash=hashes["tokenizer"], text_hash=hashes["text"])
    hashes["generator"] = save_part(Transformer(config), folder / "generator")
    parts = {part: Part("text.json" if part == "text" else part, found) for part, found in hashes.items()}
    write_model_config(folder, ModelConfig(
        name="random", image_size=384, styles=(), languages=("en",), default_sampling=SamplingOptions(guidance=5.0),
        parts=parts,
    ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--janus", type=int, metavar="LAYERS")
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one, arguments.width, arguments.depth, arguments.dtype[0])))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = [arguments.model, ""]
        if arguments.janus:
            models = [folder]
            write_janus(Path(folder), arguments.janus)
        for model, dtype in [(model, dtype) for model in models for dtype in arguments.dtype]:
            command = [sys.executable, __file__, "--one", model, "--dtype", dtype]
            command += ["--width", str(arguments.width), "--depth", str(arguments.depth)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
