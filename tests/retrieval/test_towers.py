from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from data.concepts import concept_label
from data.config import ConfigError, load_config
from data.images import to_square, to_tensor
from data.text import TextTokenizer
from retrieval.evaluation.metrics import concept_labels, ranks, recall_figures
from retrieval.towers.base import load_towers, save_towers
from retrieval.towers.multiscale import MultiScaleConfig, MultiScaleTowers, PatchHead, grid_boxes
from retrieval.training.train_towers import RetrievalTrainConfig
from tests.conftest import CAPTIONS
from tests.helpers.tiny_towers import tiny_towers
from vqvae.storage.parts import ModelError

ROOT = Path(__file__).parents[2]
TEXTS = ["红心", "a red apple", "", "ein schlafendes Gesicht mit Sonnenbrille"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, tmp_path_factory.mktemp("text") / "text.model", 400)


def tiny_config(text: TextTokenizer, **changes) -> MultiScaleConfig:
    settings = {
        "embed_dim": 8,
        "image_size": 32,
        "trunk": "resnet10t",
        "trunk_options": {"channels": [8, 8, 8, 16], "stem_width": 8, "output_stride": 8},
        "grids": [1, 3],
        "head_width": 8,
        "head_heads": 2,
        "text_encoder": {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                         "intermediate_size": 16},
        "max_text": 24,
        "num_text_pieces": text.vocab_size,
        "text_hash": text.content_hash,
    }  # fmt: skip
    return MultiScaleConfig(**{**settings, **changes})


def tiny(text: TextTokenizer, **changes) -> MultiScaleTowers:
    torch.manual_seed(0)
    return MultiScaleTowers(tiny_config(text, **changes), text).eval()


def pictures(count: int, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["patches", "regions"])
def test_saved_and_loaded(text: TextTokenizer, tmp_path: Path, head: str, dtype: str) -> None:
    towers = tiny(text, image_head=head)
    save_towers(towers, tmp_path / "towers", torch.float32)
    save_towers(towers, tmp_path / "towers", torch.float32)  # over what is there
    loaded = load_towers(tmp_path / "towers", dtype=dtype)
    assert loaded.dtype == getattr(torch, dtype)
    for features, expected in (
        (loaded.encode_text(TEXTS), towers.encode_text(TEXTS)),
        (loaded.encode_image(pictures(3)), towers.encode_image(pictures(3))),
    ):
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))
        torch.testing.assert_close(features, expected, atol=1e-6 if dtype == "float32" else 0.1, rtol=0)
    assert not loaded.training
    torch.testing.assert_close(float(loaded.scale.detach()), 1 / 0.07, rtol=1e-2, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["towers"]


def test_pictures_and_pixels_alike(text: TextTokenizer) -> None:
    towers = tiny(text)
    images = [Image.effect_noise((40 + 10 * k, 50), 90).convert("RGB") for k in range(5)]
    pixels = torch.stack([towers.preprocess(image) for image in images])
    assert pixels.shape == (5, 3, 32, 32)
    assert -1.00001 <= pixels.min() < 0 < pixels.max() <= 1.00001  # one multiplication and sum, in float32
    expected = torch.cat([towers.encode_pixels(pixels[k : k + 1]) for k in range(5)]).detach()
    for found in (towers.encode_image(images, batch_size=2), towers.encode_image(pixels)):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert towers.encode_image([]).shape == towers.encode_text([]).shape == (0, 8)


def test_a_text_does_not_depend_on_its_batch(text: TextTokenizer) -> None:
    towers = tiny(text)
    together = towers.encode_text(TEXTS)
    assert together.isfinite().all()
    for k, one in enumerate(TEXTS):
        torch.testing.assert_close(towers.encode_text([one])[0], together[k], atol=1e-6, rtol=1e-5)


def test_a_long_text_is_cut_with_a_notice(text: TextTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    towers = tiny(text)
    with caplog.at_level(logging.WARNING):
        tokens = towers.tokenize(["red " * 25_000, "red"])
    assert tokens.shape == (2, 24)
    assert len(caplog.messages) == 1
    assert "is cut to 24" in caplog.messages[0]
    assert len(caplog.messages[0]) < 150


def test_gradients_reach_both_towers(text: TextTokenizer) -> None:
    towers = tiny(text).train()
    towers.checkpoint_gradients()
    images = towers.encode_pixels(pictures(4))
    (images @ towers.encode_tokens(towers.tokenize(TEXTS)).T * towers.scale).square().sum().backward()
    assert [name for name, p in towers.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_patches_are_means_of_cells(text: TextTokenizer) -> None:
    towers = tiny(text)
    head = towers.image_head
    assert isinstance(head, PatchHead)
    features = torch.randn(2, 16, 4, 4)
    expected = torch.cat([F.adaptive_avg_pool2d(features, grid).flatten(2) for grid in (1, 3)], dim=2)
    torch.testing.assert_close(head(features), head.head(expected.transpose(1, 2)))


def test_regions(text: TextTokenizer) -> None:
    towers = tiny(text, image_head="regions")
    pixels = pictures(3)
    boxes = [torch.tensor([[0.0, 0, 10, 12], [5, 5, 30, 31]]), torch.zeros(0, 4), grid_boxes(32, [1, 3])]
    found = towers.encode_pixels(pixels, boxes).detach()
    for k in range(3):  # neither the order of boxes nor the number of another picture's matters
        alone = towers.encode_pixels(pixels[k : k + 1], [boxes[k].flip(0)])[0]
        torch.testing.assert_close(alone, found[k], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(towers.encode_pixels(pixels)[2], found[2], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(towers.encode_pixels(pixels)[0], found[0], atol=1e-3)
    with pytest.raises(ValueError, match="2 lists of boxes for 3 pictures"):
        towers.encode_pixels(pixels, boxes[:2])
    with pytest.raises(ValueError, match="take no boxes"):
        tiny(text).encode_pixels(pixels, boxes)


def test_grid_boxes() -> None:
    boxes = grid_boxes(30, [1, 3])
    assert boxes[0].tolist() == [0, 0, 30, 30]
    assert boxes[2].tolist() == [10, 0, 20, 10]
    assert boxes[-1].tolist() == [20, 20, 30, 30]
    assert ((boxes[1:, 2] - boxes[1:, 0]) * (boxes[1:, 3] - boxes[1:, 1])).sum() == 900


def test_the_shipped_sizes() -> None:
    config = load_config(RetrievalTrainConfig, ROOT / "mmwudao" / "configs" / "emoji-towers.yaml").model
    text = TextTokenizer(ROOT / "mmwudao" / "models" / "emoji" / "text.model")
    config = replace(config, num_text_pieces=text.vocab_size, text_hash=text.content_hash)
    parameters = sum(parameter.numel() for parameter in MultiScaleTowers(config, text).parameters())
    assert 2 * parameters + len(text.serialised) < 12e6, "12 MB in bfloat16"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"trunk": "resnet9000"}, "Unknown model"),
        ({"trunk": "vit_tiny_patch16_224", "trunk_options": {"img_size": 32}}, "must return a feature map"),
        ({"trunk_options": {"nonsense": 1}}, "nonsense"),
        ({"text_encoder": {"model_type": "nonsense"}}, "nonsense"),
        ({"text_encoder": {"model_type": "bert", "hidden_size": 10, "num_attention_heads": 4}}, "hidden size"),
        ({"text_hash": "cafe"}, "another text tokenizer"),
    ],
)
def test_parts_that_do_not_fit(text: TextTokenizer, changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        tiny(text, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"grids": []}, {"grids": [0]}, {"head_heads": 3}, {"max_text": 1}])
def test_sizes_that_do_not_fit(text: TextTokenizer, changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        tiny_config(text, **changes)


def test_a_damaged_folder_is_one_line(text: TextTokenizer, tmp_path: Path) -> None:
    folder = save_towers(tiny(text), tmp_path / "towers")
    config, weights = folder / "config.json", folder / "model.safetensors"
    record, content = json.loads(config.read_text()), weights.read_bytes()
    assert record["format"] == "mmwudao-towers/1"
    assert record["kind"] == "ours"

    def refused(problem: str, **arguments) -> None:
        with pytest.raises(ModelError, match=problem) as caught:
            load_towers(folder, **arguments)
        assert "\n" not in str(caught.value)

    refused("not in 'int8'", dtype="int8")
    for changes, problem in (
        ({"format": "other/1"}, "must be 'mmwudao-towers/1'"),
        ({"kind": "nonsense"}, "'nonsense'; known kinds: ours, pretrained, brivl, chinese-clip, open-clip"),
        ({"embed_dim": 9}, "does not hold towers"),
        ({"embed_dim": "nine"}, "embed_dim"),
        ({"nonsense": 1}, "unknown key nonsense"),
        ({"text_hash": "cafe"}, "another text tokenizer"),
    ):
        config.write_text(json.dumps({**record, **changes}))
        refused(problem)
    config.write_text("{")
    refused("is not JSON")
    config.write_text(json.dumps(record))
    weights.write_bytes(content[:-100])
    refused("truncated or damaged")
    weights.write_bytes(content)
    (folder / "text.model").rename(folder / "other.model")
    with pytest.raises(ValueError, match="cannot read the text tokenizer"):
        load_towers(folder)
    weights.unlink()
    refused("model.safetensors is missing")


def test_ranks() -> None:
    queries = torch.eye(3)
    candidates = torch.tensor([[0.9, 0.2, 0.5], [0.8, 0.9, 0.5], [0.7, 0.3, 0.5], [0.1, 0.1, 0.5]])
    # the second query has two right pictures, of which the better counts; the third finds all alike
    labels, candidate_labels = torch.tensor([7, 8, 9]), torch.tensor([8, 7, 8, 9])
    places = ranks(queries, candidates, labels, candidate_labels, chunk=2)
    assert places.tolist() == [2, 2, 4]
    assert ranks(queries, candidates, torch.tensor([7, 8, 1]), candidate_labels).tolist() == [2, 2, 0]
    figures = recall_figures(torch.tensor([1, 2, 4, 30, 0]))
    assert figures == {"recall@1": 0.25, "recall@5": 0.75, "recall@10": 0.75, "median_rank": 3.0, "queries": 4.0}
    with pytest.raises(ValueError, match="nothing to measure"):
        recall_figures(torch.tensor([0, 0]))


def test_ranks_against_sorting() -> None:
    torch.manual_seed(0)
    queries, candidates = torch.randn(40, 5), torch.randn(60, 5)
    labels, candidate_labels = torch.randint(20, (40,)), torch.randint(20, (60,))
    found = ranks(queries, candidates, labels, candidate_labels, chunk=7)
    for k in range(40):
        order = [int(candidate_labels[j]) for j in (candidates @ queries[k]).argsort(descending=True)]
        # right pictures that come first do not push each other back
        expected = order.index(int(labels[k])) + 1 if int(labels[k]) in order else 0
        assert int(found[k]) == expected


def test_concept_labels() -> None:
    assert concept_label("1f34e") == concept_label("1f34e") != concept_label("1f34f")
    labels = concept_labels(["1f34e", "1f34f", "1f34e"])
    assert labels.dtype == torch.int64
    assert (labels >= 0).all()
    assert labels[0] == labels[2] != labels[1]


def test_pictures_together_give_what_each_gives_alone():
    towers = tiny_towers()
    sizes = [(40, 40), (300, 260), (40, 40), (33, 50), (32, 32)]  # the second is larger than what waits for others
    pictures = [Image.effect_noise(size, 60).convert("RGB") for size in sizes]
    together = towers.stack([towers.lighten(picture) for picture in pictures])
    assert together.equal(torch.stack([towers.preprocess(picture) for picture in pictures]))
    expected = towers.normalise(to_tensor(to_square(pictures[-1], 32)))
    torch.testing.assert_close(together[-1], expected, atol=1e-6, rtol=0)
    assert isinstance(towers.lighten(pictures[1]), torch.Tensor)
