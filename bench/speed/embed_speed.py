"""Pictures a second of `embed` over shards against the bare forward pass on the same pictures in memory.

    python -m bench.speed.embed_speed [--shards data/samples/emoji] [--towers FOLDER] [--repeat 4]
    pip install --no-deps --target FOLDER clip-retrieval    # then --clip-retrieval FOLDER

Without --towers, our default architecture with random weights. Measured in turn, `--runs` times: the bare pass as it
comes, one batch after the other on all of PyTorch's threads; the same batches side by side, as `embed` encodes them;
`embed_shards`, from tar files to Parquet; and clip-retrieval's reader, runner, mapper and writer as published, with the
same towers where it loads CLIP, and the steps of CLIP's transform. `share_cpu` is the CPU time of the batches side by
side, of that of `embed`; it cannot exceed encode / (encode + read + decode).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torchvision import transforms

from bench.speed.shard_passes import add_arguments, cpu_seconds, fail, measure_passes, print_record, report
from data.batches import in_order
from data.images import open_image
from data.reading import expand_shards, read_shard
from data.text import TextTokenizer
from retrieval.towers.base import Towers, load_towers
from retrieval.towers.multiscale import MultiScaleConfig, MultiScaleTowers
from retrieval.vectors.embed import CPU_BATCH, MARGIN, embed_shards
from retrieval.vectors.settings import EmbedSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, repeat=4)
    parser.add_argument("--towers", type=Path)
    parser.add_argument("--clip-retrieval", type=Path, help="where it was installed")
    arguments = parser.parse_args()
    towers = load_towers(arguments.towers, arguments.device) if arguments.towers else random_towers(arguments.shards)
    towers.to(arguments.device)
    size = arguments.batch_size
    at_once = min(size, CPU_BATCH) if towers.device.type == "cpu" else size
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        shards = [
            Path(shutil.copy(shard, Path(scratch) / f"{number:05d}.tar"))
            for number, shard in enumerate(expand_shards(arguments.shards, arguments.split) * arguments.repeat)
        ]
        started = cpu_seconds()
        samples = [sample for shard in shards for sample in read_shard(shard, fail)]
        reading = cpu_seconds() - started
        started = cpu_seconds()
        least = MARGIN * towers.image_size
        light = [towers.lighten(open_image(sample.require_image(), least_side=least)) for sample in samples]
        batches = [towers.stack(light[start : start + size]) for start in range(0, len(light), size)]
        apart = {"read": reading, "decode": cpu_seconds() - started}
        settings = EmbedSettings(texts=False, batch_size=size, workers=arguments.workers)
        passes: dict[str, Callable[[], object]] = {
            "bare": lambda: [towers.encode_image(batch, at_once) for batch in batches],
            "side by side": lambda: list(
                in_order(lambda batch: towers.encode_image(batch, at_once), batches, arguments.workers)
            ),
            "embed": lambda: embed_shards(towers, shards, out, settings),
        }
        if arguments.clip_retrieval:
            extension = samples[0].extension
            passes["clip-retrieval"] = lambda: clip_retrieval(towers, shards, out / "clip", arguments, extension)
            load_clip_retrieval(arguments.clip_retrieval)
        towers.encode_image(batches[0])  # warm
        measured = measure_passes(passes, arguments.runs, lambda: shutil.rmtree(out))
        print_record(report(measured, len(light), sum(s.stat().st_size for s in shards), "embed", apart), arguments)


def random_towers(shards: Path) -> Towers:
    text = TextTokenizer(shards / "text.model")
    torch.manual_seed(0)
    return MultiScaleTowers(MultiScaleConfig(num_text_pieces=text.vocab_size, text_hash=text.content_hash), text).eval()


def load_clip_retrieval(folder: Path) -> None:
    """Make its modules importable without what they need to load CLIP, and without its service."""
    package = types.ModuleType("clip_retrieval")
    inference = types.ModuleType("clip_retrieval.clip_inference")
    package.__path__ = [str(folder / "clip_retrieval")]
    inference.__path__ = [str(folder / "clip_retrieval" / "clip_inference")]
    loader, sentences = types.ModuleType("all_clip"), types.ModuleType("sentence_transformers")
    loader.load_clip = sentences.SentenceTransformer = None  # type: ignore[attr-defined]
    for module in (package, inference, loader, sentences):
        sys.modules[module.__name__] = module


def clip_retrieval(
    towers: Towers, shards: list[Path], out: Path, arguments: argparse.Namespace, extension: str
) -> None:
    from clip_retrieval.clip_inference import mapper  # type: ignore[import-not-found]
    from clip_retrieval.clip_inference.reader import WebdatasetReader  # type: ignore[import-not-found]
    from clip_retrieval.clip_inference.runner import Runner  # type: ignore[import-not-found]
    from clip_retrieval.clip_inference.writer import NumpyWriter  # type: ignore[import-not-found]

    model = types.SimpleNamespace(encode_image=towers.encode_pixels, encode_text=None)
    mapper.load_clip = lambda **_: (model, None, None)
    steps = [
        transforms.Resize(towers.image_size, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(towers.image_size),
        lambda image: image.convert("RGB"),
        transforms.ToTensor(),
        transforms.Normalize(towers.pixel_mean, towers.pixel_std),
    ]
    names = [str(shard) for shard in shards]
    Runner(
        reader_builder=lambda sampler: WebdatasetReader(
            sampler, transforms.Compose(steps), lambda texts: texts, names, arguments.batch_size, arguments.workers,
            enable_text=False, enable_metadata=True, wds_image_key=extension,
        ),
        mapper_builder=lambda: mapper.ClipMapper(True, False, True, False, "", False, ""),
        writer_builder=lambda partition: NumpyWriter(partition, str(out), False, True, True, 1),
        logger_builder=lambda partition: _Silent(),
        output_partition_count=1,
    )(0)  # fmt: skip


class _Silent:
    """In the place of its logger, which starts a process."""

    def start(self) -> None:
        return None

    def __call__(self, stats: object) -> None:
        return None

    end = start


if __name__ == "__main__":
    main()
