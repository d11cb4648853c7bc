"""The picture's vector before its descriptions: rows, batches, beam search, and the probability of a caption."""

from __future__ import annotations

import random
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from torch import Tensor

from data.text import TextTokenizer
from generation.captions import caption_log_probabilities, describe
from generation.rows.base import Chance, RowRecipe
from generation.rows.describe import DescribeRows
from generation.rows.prompt import Prompt
from generation.rows.row import collate, pack
from generation.rows.texts import CaptionMix
from generation.training.pairs import CodedPairs
from generation.transformer.model import Transformer
from generation.transformer.prompt_features import PromptFeatures
from tests.helpers.tiny_codes import make_config, write_workspace

WIDTH = 5


class Pictures:
    """Vectors of pictures, decided by their ids."""

    width = WIDTH

    def of_sample(self, id: str) -> Tensor:
        generator = torch.Generator().manual_seed(int.from_bytes(sha256(id.encode()).digest()[:6], "big"))
        return torch.nn.functional.normalize(torch.randn(1, WIDTH, generator=generator), dim=-1)

    def of_text(self, text: str) -> Tensor:
        return self.of_sample(text)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("described")
    write_workspace(folder)
    return folder


@pytest.fixture(scope="module")
def model(workspace) -> Transformer:
    torch.manual_seed(0)
    config = make_config(workspace, workspace / "run").model
    features = PromptFeatures("both", WIDTH, "cafe" * 16)
    return Transformer(replace(config, num_text_pieces=320, grid=(4, 4), prompt_features=features)).eval()


@pytest.fixture(scope="module")
def recipe(workspace) -> RowRecipe:
    return RowRecipe(TextTokenizer(workspace / "text.model"), CaptionMix(), features=Pictures(), from_picture=0.5)


def test_a_row_has_the_vector_at_each_text(workspace, model, recipe):
    pairs, rows = CodedPairs(workspace / "codes", "train"), DescribeRows(model.config)
    chance = Chance(random.Random(1), 1.0, lambda rng: pairs.codes[0])
    seen, blind = 0, 0
    for number in range(100):
        picture = pairs.picture(number % len(pairs))
        row = rows.training_row(picture, recipe, chance)
        starts = row.tokens == model.config.vocabulary.command("[ROI1]")
        assert row.features is not None
        assert len(row.features) == int(starts.sum())
        seen += torch.equal(row.features, recipe.features.of_sample(picture.sample.id).expand_as(row.features))
        blind += not row.features.any()
    assert seen + blind == 100
    assert 10 < blind < 45
    held_out = rows.held_out_row(pairs.picture(0), recipe, False)
    assert held_out.features is not None
    assert torch.equal(held_out.features, recipe.features.of_sample(pairs.samples[0].id))
    assert rows.training_row(pairs.picture(0), replace(recipe, from_picture=0.0), chance).features is None


def test_rows_together_are_rows_one_by_one(workspace, model, recipe):
    pairs, rows, vocabulary = (
        CodedPairs(workspace / "codes", "train"),
        DescribeRows(model.config),
        model.config.vocabulary,
    )
    chance = Chance(random.Random(1), 1.0, lambda rng: pairs.codes[0])
    some = [rows.training_row(pairs.picture(number), recipe, chance) for number in range(3)]
    alone = [collate(vocabulary, [row]) for row in some]
    counts = [int((one.weights > 0).sum()) for one in alone]
    mean = sum(float(model.loss(one)["loss"].detach()) * n for one, n in zip(alone, counts, strict=True)) / sum(counts)
    for together in (collate, pack):
        assert float(model.loss(together(vocabulary, some))["loss"].detach()) == pytest.approx(mean, abs=1e-5)


def test_the_vector_counts_in_search_and_in_probabilities(model):
    codes, source = torch.arange(16).view(4, 4) % 8, Pictures()
    found = {}
    for name in ("a", "b", "none"):
        vector = None if name == "none" else source.of_sample(name)
        best = describe(model, codes, Prompt((3, 4), vector), beams=1, max_pieces=4)[0]
        found[name] = best.log_probability
    assert len(set(found.values())) == 3
    two = torch.cat([source.of_sample("a"), source.of_sample("b")])
    both = caption_log_probabilities(model, codes.expand(2, 4, 4), [3, 4, 5], features=two)
    apart = [caption_log_probabilities(model, codes[None], [3, 4, 5], features=one[None]) for one in two]
    torch.testing.assert_close(both, torch.cat(apart), rtol=0, atol=1e-5)
