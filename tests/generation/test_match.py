"""Rows that are matched, and the head that makes their vectors."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data.concepts import label_of
from data.config import ConfigError, load_config, to_stored
from data.sample import Sample
from data.text import TextTokenizer
from generation.rows.base import Chance, CodedPicture, Given, RowRecipe
from generation.rows.draw import training_row
from generation.rows.match import MatchRows, matched_row
from generation.rows.row import Row, collate, pack
from generation.rows.texts import CaptionMix
from generation.training.batches import RowBatches, RowMaker, held_out_batches
from generation.training.config import GeneratorTrainConfig
from generation.training.matching import MatchTraining, prepare_head
from generation.training.pairs import CodedPairs
from generation.training.train_generator import LossModule, train
from generation.transformer.config import TransformerConfig
from generation.transformer.match_head import MatchOptions
from generation.transformer.model import Transformer
from generation.transformer.visibility import Visibility
from tests.helpers.generators import PRESETS, make_model
from tests.helpers.tiny_codes import make_config, sample, write_workspace
from vqvae.storage.parts import content_hash, load_part, save_part

CODES = torch.arange(16).view(4, 4)
TEXTS = [[1, 2, 3], [], [7, 8, 9, 10, 11, 12, 13]]  # the last is cut


def matching(preset: str = "modern") -> Transformer:
    return make_model(replace(PRESETS[preset], match=MatchOptions(8)))


def parts_of(rows: MatchRows, codes: Tensor = CODES) -> list[Row]:
    return [rows.picture_row(codes), *(rows.text_row(text) for text in TEXTS)]


def alone(model: Transformer, row: Row) -> Tensor:
    """The vector of one row by itself, which is causal."""
    return model.vectors(model(row.tokens[None], row.positions[None]), row.tokens[None])[0]


def test_rows_end_in_enc_and_nothing_is_learned():
    rows = MatchRows(PRESETS["modern"])
    vocab = rows.format.vocabulary
    names = ("[ROI1]", "[ENC]", "[TINY]", "[BOI1]", "[EOI1]", "[PAD]")
    roi, enc, tiny, boi, eoi, pad = (vocab.command(name) for name in names)
    row = matched_row(parts_of(rows), label=5)
    picture = [tiny, boi, *range(16), eoi, enc]
    texts = [[roi, *(32 + piece for piece in text[:6]), enc] for text in TEXTS]
    assert row.tokens.tolist() == [*picture, *(token for text in texts for token in text)]
    assert row.targets.tolist() == [pad] * len(row.tokens)
    assert not row.image_mask.any()
    assert row.segments is not None
    assert row.segments.tolist() == [1] * 20 + [2] * 5 + [3] * 2 + [4] * 8
    assert rows.prompt(Given([1, 2, 3], (4, 4))) == texts[0]
    assert rows.prompt(Given([], (4, 4), CODES)) == picture
    # texts stand where those of rows that draw stand, codes where all rows have them
    assert rows.text_row([1, 2]).positions.tolist() == [[t, t] for t in range(4)]
    assert rows.picture_row(CODES).positions[2].tolist() == [10, 10]
    with pytest.raises(ValueError, match=r"\[h, w\], not \[16\]"):
        rows.picture_row(CODES.flatten())
    with pytest.raises(ValueError, match="text pieces must lie in"):
        rows.text_row([50])


def test_who_sees_whom():
    row = matched_row(parts_of(MatchRows(PRESETS["modern"])))
    assert row.segments is not None
    found = Visibility.of(row.tokens[None], None, row.segments[None]).visible()[0]
    segments = row.segments.tolist()
    for i, own in enumerate(segments):
        for j, other in enumerate(segments):
            assert bool(found[i, j]) == (j <= i and own == other)


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_packed_as_padded_as_alone(preset):
    model = matching(preset)
    rows, vocab = MatchRows(model.config), model.config.vocabulary
    pictures = [CODES, CODES.flip(0), CODES.flip(1) + 16]
    joined = [matched_row(parts_of(rows, codes), label) for label, codes in enumerate(pictures)]
    expected_images = torch.stack([alone(model, rows.picture_row(codes)) for codes in pictures])
    expected_texts = torch.stack([alone(model, rows.text_row(text)) for text in TEXTS for _ in pictures])
    assert not torch.allclose(expected_images[0], expected_images[1], atol=1e-3)
    for together in (collate, pack):
        batch = together(vocab, joined)
        assert batch.labels is not None
        assert batch.labels.tolist() == [0, 1, 2]
        images, texts = model.match(batch.to("cpu"))
        torch.testing.assert_close(images, expected_images, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(texts, expected_texts, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(images.norm(dim=1), torch.ones(3))
    # texts alone in one batch: what stands behind [ENC] changes nothing
    padded = collate(vocab, [rows.text_row(text) for text in TEXTS])
    found = model.vectors(model(padded.tokens, padded.positions), padded.tokens)
    torch.testing.assert_close(found, expected_texts[::3], atol=1e-5, rtol=1e-5)


class WordLengths:
    """A piece for each word, its length."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


RECIPE = RowRecipe(WordLengths(), CaptionMix(dropout=1.0), match_texts=3)


def other_codes(rng: random.Random) -> Tensor:
    return torch.full((4, 4), 31)


def test_a_training_row_has_captions_and_some_of_the_codes():
    rows = MatchRows(PRESETS["modern"])
    picture = CodedPicture(sample(3, concept="c"), CODES)
    row = rows.training_row(picture, RECIPE, Chance(random.Random(0), 0.5, other_codes))
    assert row.label == label_of(picture.sample) == label_of(Sample("x", None, "", concept="c"))
    assert row.segments is not None
    # dropout of captions is for rows that draw: here each has its text
    counts = [int((row.segments == number).sum()) for number in range(1, 5)]
    assert counts[0] == 8 + 4
    assert all(count > 2 for count in counts[1:])
    assert int(row.segments.max()) == 4
    noisy = rows.training_row(picture, replace(RECIPE, code_noise=1.0), Chance(random.Random(0), 1.0, other_codes))
    assert 0 < int((noisy.tokens[:20] == 31).sum()) < 16
    # the towers' own vector of a picture, which such a row must not read, is not even asked for
    assert row.features is None
    held_out = [rows.held_out_row(picture, RECIPE, named_style=False) for _ in range(2)]
    assert torch.equal(held_out[0].tokens, held_out[1].tokens)
    assert held_out[0].segments is not None
    assert int(held_out[0].segments.max()) == 2
    assert not rows.suits(Sample("x", None, ""))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_workspace(tmp_path_factory.mktemp("workspace"))


def test_a_step_that_matches_has_its_own_number_of_pictures(workspace, tmp_path):
    config = make_config(
        workspace, tmp_path / "out", model={"match": {"width": 8}}, mix={"match": 1}, match={"texts": 2, "batch": 3}
    )
    pairs = CodedPairs(workspace / "codes", "train")
    model = replace(config.model, num_text_pieces=320, grid=(4, 4))
    maker = RowMaker(TextTokenizer(workspace / "text.model"), model, config)
    ((batch, _), ids), *rest = RowBatches(pairs, maker)(0)
    assert not rest
    assert batch.kind == "match"
    assert batch.labels is not None
    assert len(ids) == len(batch.labels) == 24
    wanted = {one.id: label_of(one) for one in pairs.samples}
    assert batch.labels.tolist() == [wanted[one] for one in ids]
    images, texts = Transformer(model).match(batch)
    assert (images.shape, texts.shape) == ((24, 8), (48, 8))
    held_out = held_out_batches(pairs, maker, "match")
    assert sum(len(one.labels) for one in held_out if one.labels is not None) == 40


# the head in files


def test_a_generator_without_a_head_is_stored_as_before(tmp_path):
    torch.manual_seed(0)
    plain = Transformer(PRESETS["modern"])
    torch.manual_seed(0)
    headed = Transformer(replace(PRESETS["modern"], match=MatchOptions(8)))
    assert "match" not in to_stored(plain.config)
    extra = set(headed.state_dict()) - set(plain.state_dict())
    assert extra == {"match_head.weight", "match_head.logit_scale"}
    for name, value in plain.state_dict().items():
        assert torch.equal(headed.state_dict()[name], value), name
    save_part(plain, tmp_path / "plain")
    assert "match" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    found = save_part(headed, tmp_path / "headed")
    loaded = load_part(Transformer, tmp_path / "headed")
    assert loaded.config == headed.config
    assert content_hash(loaded) == found
    assert float(1 / loaded.match_head.scale.detach()) == pytest.approx(0.07, rel=0.01)
    with pytest.raises(ValueError, match="width must be a whole number of at least 0"):
        TransformerConfig(match=MatchOptions(-1))


def test_training_goes_on_with_a_first_head(workspace, tmp_path):
    start = train(make_config(workspace, tmp_path / "first", steps=2, eval_every=2))
    trained = load_part(Transformer, start)
    headed = make_config(
        workspace, tmp_path / "second", model={"match": {"width": 8}}, mix={"draw": 1, "match": 1},
        match={"temperature": 0.2, "learn_temperature": False}, steps=4, learning_rate=1e-9,
    )  # fmt: skip
    headed = replace(headed, start_from=str(start))
    with pytest.raises(ConfigError, match=r"mix\.match needs an objective"):
        train(headed)
    found = load_part(Transformer, train(headed, objective=Distances()))
    for name, value in trained.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    assert float(1 / found.match_head.scale.detach()) == pytest.approx(0.2, rel=0.01)
    wider = make_config(workspace, tmp_path / "third", model={"match": {"width": 4}}, mix={"match": 1})
    with pytest.raises(ConfigError, match="another configuration"):
        train(replace(wider, start_from=str(tmp_path / "second" / "generator")), objective=Distances())


class Distances:
    """An objective that draws a picture and its texts together."""

    def loss(self, images: Tensor, texts: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        return (1 - (images.repeat(len(texts) // len(images), 1) * texts).sum(1)).mean() * scale

    def recall(self, images: Tensor, texts: Tensor, labels: Tensor) -> dict[str, float]:
        return {"near": float((images * texts).sum(1).mean())}


def test_every_kind_of_step_gives_every_weight_a_gradient(tmp_path):
    """DDP waits for all of them: steps that draw leave the head alone, steps that match the logits."""
    model = Transformer(replace(PRESETS["learned-2d"], match=MatchOptions(8)))
    rows, vocab, config = MatchRows(model.config), model.config.vocabulary, model.config
    matched = collate(vocab, [matched_row(parts_of(rows), label) for label in range(2)])
    drawn = collate(vocab, [training_row(vocab, [1, 2], CODES, config.max_text, config.position_kind)])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(LossModule(model, Distances()))
        for batch in (drawn, matched, drawn, drawn, matched, matched):
            model.zero_grad(set_to_none=True)
            wrapped(batch, batch.weights.sum())["loss"].backward()
            assert all(weight.grad is not None for weight in model.parameters())
            head = model.match_head.weight.grad
            assert head is not None
            assert bool(head.any()) == (batch is matched)
    finally:
        dist.destroy_process_group()


def test_the_temperature_is_learned_or_fixed():
    model = matching()
    prepare_head(model, MatchTraining(temperature=0.5))
    assert float(model.match_head.scale.detach()) == pytest.approx(2)
    assert model.match_head.logit_scale.requires_grad
    prepare_head(model, MatchTraining(learn_temperature=False))
    assert float(model.match_head.scale.detach()) == pytest.approx(2)
    assert not model.match_head.logit_scale.requires_grad
    prepare_head(make_model(PRESETS["modern"]), MatchTraining(temperature=0.5))  # nothing to prepare


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["mix.match=0.1", "mix.draw=0.9"], r"mix\.match needs a head.*model\.match\.width"),
        (["model.match.width=8"], r"mix\.match trains: give it a weight"),
        (["mix.match=1", "model.match.width=8", "parallel.tensor=2"], r"parallel\.shard instead of parallel\.tensor"),
        (["mix.match=1", "model.match.width=8", "match.texts=0"], "texts must be"),
        (["mix.match=1", "model.match.width=8", "match.temperature=0"], "temperature must be"),
        (["model.match.width=8", "model.frame.kind=marks", "mix.match=1"], "a frame of its own"),
    ],
)
def test_settings_that_do_not_go_together(settings, problem, tmp_path: Path):
    with pytest.raises(ConfigError, match=problem):
        load_config(GeneratorTrainConfig, None, settings)
