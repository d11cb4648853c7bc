"""The model in the box: its size, its hashes, and that it does what its card says, on the sample pictures."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.images import to_square, to_tensor
from data.reading import open_shards
from data.styles import LANGUAGES
from generation.rows.row import Row
from generation.rows.texts import CaptionMix, draw_caption
from mmwudao.loading.model_dir import SHIPPED
from mmwudao.pipeline import Pipeline, load
from mmwudao.tasks import encode_pictures
from vqvae.train_tokenizer import measure_reconstruction

SAMPLE = Path(__file__).parents[2] / "data" / "samples" / "emoji"
MAX_BYTES = 24e6  # all but the towers, in bf16
MAX_TEXT_TOWER_BYTES, MAX_IMAGE_TOWER_BYTES = 12e6, 10e6


@pytest.fixture(scope="module")
def emoji() -> Pipeline:
    return load("emoji", device="cpu", dtype="float32")


def test_it_is_small() -> None:
    sizes = {file.parent.name: file.stat().st_size for file in (SHIPPED / "emoji").rglob("*.safetensors")}
    towers = SHIPPED / "emoji" / "towers"
    stored = load_file(towers / "model.safetensors")
    text = sum(tensor.nbytes for name, tensor in stored.items() if name.startswith(("text_encoder.", "text_head.")))
    assert 1e6 < text + (towers / "tokenizer.json").stat().st_size <= MAX_TEXT_TOWER_BYTES
    assert 1e6 < sizes.pop("towers") - text <= MAX_IMAGE_TOWER_BYTES
    assert 1e6 < sum(sizes.values()) <= MAX_BYTES


def test_the_tokenizer_restores_pictures_it_never_saw(emoji: Pipeline) -> None:
    side = emoji.config.image_size
    found = [to_tensor(to_square(image, side)) for _, image in open_shards(SAMPLE, "test-concept")]
    pictures = torch.stack([(pixels * 255).to(torch.uint8) for pixels in found])
    figures, _ = measure_reconstruction(emoji.tokenizer, pictures, torch.device("cpu"))
    assert figures.psnr >= 22


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_towers_find_pictures_they_never_saw(emoji: Pipeline, language: str) -> None:
    found = list(open_shards(SAMPLE, "test-family"))
    images = emoji.towers.encode_image([image for _, image in found])
    texts = emoji.towers.encode_text([sample.captions[language].name for sample, _ in found])
    first = (texts @ images.T).argmax(dim=1)
    concepts = [sample.concept for sample, _ in found]
    hits = sum(concepts[int(k)] == concepts[i] for i, k in enumerate(first))
    assert hits / len(found) > 0.5
    assert len(found) > 10


def test_the_generator_knows_the_pictures_from_other_codes(emoji: Pipeline) -> None:
    from generation.rows.draw import training_row
    from generation.rows.row import collate

    config = emoji.generator.config
    captions = CaptionMix(name=1.0, keywords=0.0, style=1.0, dropout=0.0)
    rows: list[Row] = []
    shuffled: list[Row] = []
    for sample, image in open_shards(SAMPLE, "test-family"):
        codes = encode_pictures(emoji, [image])[0]
        caption = draw_caption(sample, captions, random.Random(sample.id))
        features = emoji.features.of_text(caption.name) if emoji.features is not None else None
        order = torch.randperm(codes.numel(), generator=torch.Generator().manual_seed(0))
        for into, seen in ((rows, codes), (shuffled, codes.flatten()[order].view(codes.shape))):
            row = training_row(
                config.vocabulary, emoji.text.encode(caption.text), seen, config.max_text, config.position_kind
            )
            into.append(replace(row, features=features))
    with torch.inference_mode():
        real, noise = (emoji.generator.loss(collate(config.vocabulary, r))["image_bits"] for r in (rows, shuffled))
    assert real < math.log2(config.num_image_codes) / 2  # of a uniform guess's bits
    assert noise > real + 2


def test_prompts_of_every_language_and_of_none(emoji: Pipeline) -> None:
    prompts = ["戴墨镜的笑脸", "red apple", "cœur rouge", "schlafendes Gesicht", "červené jablko", "赤リンゴ"]
    prompts.append("빨간 사과")
    assert len(prompts) == len(LANGUAGES)
    pictures = emoji.generate([*prompts, "🍎🕶️", "تفاحة حمراء", "𒀀𒁀"], seed=1, candidates=0)
    assert {picture.size for picture in pictures} == {(emoji.config.image_size, emoji.config.image_size)}
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_picture_does_not_depend_on_its_batch(dtype: str) -> None:
    pipe = load("emoji", device="cpu", dtype=dtype)
    draw = partial(pipe.generate, candidates=0)
    many = draw("red apple", n=9, seed=5)
    assert draw("red apple", seed=5)[0].tobytes() == many[0].tobytes()
    assert draw("red apple", n=3, seed=6)[2].tobytes() == many[3].tobytes()
    assert draw(["schlafendes Gesicht", "red apple"], seed=12)[1].tobytes() == many[8].tobytes()
    # the one that is kept is one of the candidates
    assert pipe.generate("red apple", seed=5)[0].tobytes() in [one.tobytes() for one in many[:4]]
