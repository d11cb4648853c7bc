"""Pictures of stripes, which a tiny tokenizer learns in seconds."""

import io

import numpy
from PIL import Image

from data.sample import Caption, Sample
from data.shards import Manifest, ShardWriter, write_manifest
from vqvae.model import VQVAEConfig
from vqvae.train_tokenizer import TokenizerDataConfig, TokenizerTrainConfig
from vqvae.training.config import LoopConfig


def stripes(number: int, size: int = 16) -> Image.Image:
    """A picture that is easy to learn: two colours in stripes, of a dozen kinds."""
    rng = numpy.random.default_rng(number % 12)
    colours = rng.integers(0, 256, (2, 3))
    rows = (numpy.arange(size) // 4 % 2)[:, None].repeat(size, 1)
    return Image.fromarray(colours[rows.T if number % 2 else rows].astype(numpy.uint8))


def sample(number: int) -> Sample:
    buffer = io.BytesIO()
    stripes(number).save(buffer, "PNG")
    captions = {"en": Caption(f"stripes {number}")}
    return Sample(f"s{number:03d}", buffer.getvalue(), "png", captions, family="noto" if number % 2 else "openmoji")


def stripe_shards(folder):
    """48 pictures to train on and 12 to test on."""
    splits = {}
    for split, numbers in (("train", range(48)), ("test-concept", range(48, 60))):
        with ShardWriter(folder, split, 20) as writer:
            for number in numbers:
                writer.write(sample(number))
        splits[split] = writer.shards
    write_manifest(folder, Manifest("stripes", 16, splits))
    return folder


def train_config(shards, out, data=None, **loop) -> TokenizerTrainConfig:
    steps = {"steps": 80, "batch_size": 16, "learning_rate": 5e-3, "warmup": 5, "eval_every": 20, "save_every": 80}
    return TokenizerTrainConfig(
        data=TokenizerDataConfig(**{"shards": str(shards), "image_size": 16, "in_memory": True, **(data or {})}),
        model=VQVAEConfig(channels=[16, 32], residual_blocks=1, code_dim=4, codebook_size=16),
        loop=LoopConfig(**{"out": str(out), "log_every": 20, "device": "cpu", "precision": "float32", **steps, **loop}),
    )
