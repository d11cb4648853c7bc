"""One generator that draws, describes and matches, beside open_clip's CoCa of equal size after as many minutes.

    python bench/quality/beside_coca.py CONFIG [KEY=VALUE...] --shards shards/emoji [--layers 4] [--patch 8]

CONFIG is one of `train generator` with describe and match in its mix; `loop` is how each of the two trains, one after
the other: the same minutes (or steps), batch, optimizer, rate and average. CoCa (Yu et al. 2022, arXiv:2205.01917)
learns from the pixels that the codes were made of, and is as wide as brings its parameters nearest to the generator's.
Its text is contrasted and told at once, so all of it stands behind its language ("en: red apple"), queries too; its
loss is the paper's (captions count twice), with pictures of one concept as each other's positives, as for ours. For
both: recall at 10 of held-out pictures, as means over languages, and bits a piece of their names. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from open_clip.coca_model import CoCa
from torch import Tensor, nn
from torch.nn import functional as F

from data.config import load_config
from data.styles import tagged
from data.text import TextTokenizer
from generation.rows.texts import descriptions
from generation.training.batches import RowMaker, held_out_batches, mean_bits
from generation.training.config import GeneratorTrainConfig
from generation.training.pairs import CodedPairs
from generation.training.train_generator import train
from generation.transformer.model import Transformer
from mmwudao.loading.generator_towers import GeneratorTowers
from mmwudao.loading.towers import FrozenTowers, LiveFeatures, load_model_towers
from mmwudao.matching import ContrastiveMatch
from retrieval.evaluation.metrics import ranks, recall_figures
from retrieval.towers.base import Tokens, Towers, unit
from retrieval.training.pairs import PairsConfig, Pictures, queries_by_language
from retrieval.training.split_recall import quiet, vectors_of_pixels
from vqvae.storage.parts import load_part, without_weights
from vqvae.tokenizers import load_image_tokenizer
from vqvae.training.config import LoopConfig
from vqvae.training.loop import train_model
from vqvae.training.task import Task

PAD, START, END, FIRST_PIECE = range(4)  # ids of CoCa's text
HEAD = 32  # width of an attention head
QUERIES = 64  # vectors that CoCa's pooler hands to its decoder
CAPTION_WEIGHT = 2.0  # Yu et al. 2022, section 4.1
CPU = torch.device("cpu")


class CocaTowers(Towers):
    """open_clip's CoCa over our text model."""

    kind = "coca"

    def __init__(self, width: int, arguments: argparse.Namespace, text: TextTokenizer, max_text: int) -> None:
        super().__init__()
        self.text, self.longest = text, max_text + 2
        self.image_size, self.embed_dim = arguments.image_size, width
        both = {"width": width, "layers": arguments.layers}
        words = {"context_length": self.longest, "vocab_size": text.vocab_size + FIRST_PIECE, "heads": width // HEAD}
        looks = {"image_size": arguments.image_size, "patch_size": arguments.patch, "head_width": HEAD}
        pools = {"attentional_pool": True, "attn_pooler_queries": QUERIES, "attn_pooler_heads": width // HEAD}
        self.model = CoCa(
            width,
            multimodal_cfg={**both, **words},
            text_cfg={**both, **words, "embed_cls": True, "output_tokens": True},
            vision_cfg={**both, **looks, **pools, "output_tokens": True},
        )
        self.model.text.correct_cls_mask = True  # "the original is wrong", says open_clip

    @property
    def scale(self) -> Tensor:
        return self.model.logit_scale.exp().clamp(max=100)

    def tokenize(self, texts: list[str]) -> Tokens:
        ids = torch.full((len(texts), self.longest), PAD)
        for row, text in zip(ids, texts, strict=True):
            pieces = [piece + FIRST_PIECE for piece in self.text.encode(text)[: self.longest - 2]]
            row[: len(pieces) + 2] = torch.tensor([START, *pieces, END])
        return ids

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return unit(self.model.encode_image(pixels))

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        return unit(self.model.encode_text(tokens))

    def told(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The vectors of pictures and texts, and the mean loss of a piece of the texts (nats), ends included."""
        found = self.model(pixels, tokens)
        losses = F.cross_entropy(found["logits"].float().transpose(1, 2), found["labels"], ignore_index=PAD)
        return unit(found["image_features"]), unit(found["text_features"]), losses


class CocaLossModule(nn.Module):
    """CoCa with its loss as `forward`."""

    def __init__(self, towers: CocaTowers) -> None:
        super().__init__()
        self.towers, self.objective = towers, ContrastiveMatch()

    def forward(self, pixels: Tensor, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        images, texts, caption = self.towers.told(self.towers.normalise(pixels.float() / 255), tokens)
        with torch.autocast(images.device.type, enabled=False):
            contrast = self.objective.loss(images, texts, labels, self.towers.scale)
        return {"loss": CAPTION_WEIGHT * caption + contrast, "caption_bits": caption.detach() / math.log(2)}


CocaBatch = tuple[Tensor, Tensor, Tensor]  # pixels, tokens, labels


class CocaBatches:
    """Pictures, each with its name in a random language; (seed, step) decides."""

    def __init__(self, pictures: Pictures, towers: CocaTowers, config: GeneratorTrainConfig) -> None:
        self.pictures, self.towers, self.loop = pictures, towers, config.loop
        self.weights = pictures.weights(config.data.balance)

    def __call__(self, step: int) -> Iterator[tuple[CocaBatch, list[str]]]:
        seed = self.loop.seed * 1_000_003 + step
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(self.weights, self.loop.batch_size, replacement=True, generator=generator)
        for part in drawn.split(self.loop.batch_size // self.loop.accumulate):
            samples = [self.pictures.samples[index] for index in part.tolist()]
            tokens = self.towers.tokenize([rng.choice(descriptions(sample)) for sample in samples])
            assert isinstance(tokens, Tensor)
            yield (self.pictures.pixels[part], tokens, self.pictures.labels[part]), [sample.id for sample in samples]


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def coca_of(size: int, arguments: argparse.Namespace, text: TextTokenizer, max_text: int) -> CocaTowers:
    """The CoCa whose parameters are nearest to `size`."""

    def distance(width: int) -> int:
        with without_weights():
            return abs(parameters(CocaTowers(width, arguments, text, max_text)) - size)

    return CocaTowers(min(range(HEAD, 1025, HEAD), key=distance), arguments, text, max_text)


def train_coca(towers: CocaTowers, pictures: Pictures, config: GeneratorTrainConfig) -> CocaTowers:
    loop: LoopConfig = replace(config.loop, out=f"{config.loop.out}-coca")
    kept: list[CocaTowers] = []

    def task(device: torch.device) -> Task:
        def loss_of(wrapped: nn.Module, batch: CocaBatch) -> dict[str, Tensor]:
            found: dict[str, Tensor] = wrapped(*(tensor.to(device) for tensor in batch))
            return found

        def save(averaged: nn.Module, folder: Path) -> None:
            assert isinstance(averaged, CocaLossModule)
            kept.append(averaged.towers)

        batches = CocaBatches(pictures, towers, config)
        return Task(CocaLossModule(towers), batches, loss_of, lambda model, step: {}, "coca", save)

    train_model(loop, task)
    return kept[0].cpu().eval()


def recall(towers: Towers, pictures: Pictures, say: Callable[[str, str], str]) -> dict[str, float]:
    """Recall at 10 both ways; a query is the name of a concept, as `say(name, language)` puts it."""
    images, found = vectors_of_pixels(towers, pictures.pixels), dict[str, list[float]]()
    for language, (names, labels) in queries_by_language(pictures.samples).items():
        with quiet():
            texts = towers.encode_text([say(name, language) for name in names])
        ways = {
            "recall text to image": ranks(texts, images, labels, pictures.labels),
            "recall image to text": ranks(images, texts, pictures.labels, labels),
        }
        for way, positions in ways.items():
            found.setdefault(way, []).append(recall_figures(positions)["recall@10"])
    return {way: sum(shares) / len(shares) for way, shares in found.items()}


@torch.no_grad()
def coca_figures(towers: CocaTowers, pictures: Pictures) -> dict[str, float]:
    texts = [random.Random(sample.id).choice(descriptions(sample)) for sample in pictures.samples]
    bits = []
    for start in range(0, len(texts), 64):
        tokens = towers.tokenize(texts[start : start + 64])
        assert isinstance(tokens, Tensor)
        pixels = towers.normalise(pictures.pixels[start : start + 64].float() / 255)
        bits += [float(towers.told(pixels, tokens)[2]) / math.log(2)] * len(tokens)
    return {"bits a piece": sum(bits) / len(bits), **recall(towers, pictures, tagged)}


@torch.no_grad()
def own_figures(towers: GeneratorTowers, pictures: Pictures, pairs: CodedPairs, maker: RowMaker) -> dict[str, float]:
    return {
        "bits a code": mean_bits(towers.generator, held_out_batches(pairs, maker), CPU)["image_bits"],
        "bits a piece": mean_bits(towers.generator, held_out_batches(pairs, maker, "describe"), CPU)["text_bits"],
        **recall(towers, pictures, lambda name, language: name),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--shards", required=True, help="of the pictures that the codes were made of")
    parser.add_argument("--layers", type=int, default=4, help="of each of CoCa's three transformers")
    parser.add_argument("--patch", type=int, default=8, help="pixels a side of a patch that CoCa sees")
    arguments = parser.parse_intermixed_args()
    config = load_config(GeneratorTrainConfig, arguments.config, arguments.overrides)
    if not (config.mix.get("match") and config.mix.get("describe") and config.data.tokenizer):
        parser.error("CONFIG needs match and describe in its mix, and data.tokenizer")
    tokenizer, text = load_image_tokenizer(config.data.tokenizer), TextTokenizer(Path(config.data.text_model))
    splits = {split: CodedPairs(Path(config.data.codes), split) for split in config.data.test}
    arguments.image_size = next(iter(splits.values())).grid[0] * tokenizer.config.stride
    encoder = FrozenTowers(config.data.towers) if config.model.prompt_features.used else None
    generator = load_part(Transformer, train(config, encoder=encoder, objective=ContrastiveMatch())).float()
    own = GeneratorTowers(generator, tokenizer.float(), text, arguments.image_size).eval()
    data = PairsConfig(arguments.shards, train=config.data.train, exclude_families=config.data.exclude_families)
    coca = coca_of(parameters(generator), arguments, text, config.model.max_text)
    coca = train_coca(coca, Pictures(data, config.data.train, arguments.image_size), config)
    features = LiveFeatures(load_model_towers(config.data.towers, "cpu"), ()) if encoder else None
    maker = RowMaker(text, generator.config, GeneratorTrainConfig(data=config.data), features)
    sizes = {"one model": parameters(generator), "CoCa": parameters(coca)}
    print(f"parameters: one model {sizes['one model']:,}, CoCa {sizes['CoCa']:,}")
    record: dict[str, object] = {"parameters": sizes}
    for split, pairs in splits.items():
        pictures = Pictures(data, split, arguments.image_size, config.data.test_pictures)
        columns = {"one model": own_figures(own, pictures, pairs, maker), "CoCa": coca_figures(coca, pictures)}
        for name in columns["one model"]:
            cells = (f"{found[name]:12.4f}" if name in found else f"{'-':>12}" for found in columns.values())
            print(f"{split:14} {name:22} " + " ".join(cells))
        record[split] = columns
    print(json.dumps(record))


if __name__ == "__main__":
    main()
