"""A generator that matches texts with pictures: its objective, its training, and its vectors in place of towers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data.codes import CodedSample
from data.images import to_square, to_tensor
from data.text import TextTokenizer
from generation.rows.match import matched_row
from generation.rows.row import collate
from generation.training.batches import RowMaker, held_out_batches
from generation.training.pairs import CodedPairs
from generation.transformer.model import Transformer
from mmwudao.cli.app import run
from mmwudao.loading.generator_towers import GeneratorTowers
from mmwudao.loading.options import VectorMaker
from mmwudao.loading.vectors import load_vector_maker
from mmwudao.matching import ContrastiveMatch
from retrieval.evaluation.metrics import ranks, recall_figures
from tests.helpers.tiny_codes import CODES, coded, logged, make_config, sample, write_codes, write_workspace
from vqvae.storage.parts import ModelError, content_hash, load_part

CONCEPTS = 8


def by_hand(queries: Tensor, candidates: Tensor, right: Tensor, scale: float) -> float:
    """The mean over queries of the mean over right candidates of minus the logarithm of their share."""
    losses = []
    for query, row in zip(queries, right, strict=True):
        shares = torch.stack([(scale * query @ one).exp() for one in candidates])
        losses.append(-torch.stack([(shares[k] / shares.sum()).log() for k in row.nonzero()[:, 0]]).mean())
    return float(torch.stack(losses).mean())


def test_the_loss_is_that_of_the_towers_in_both_directions():
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(count, 6, generator=generator), dim=1) for count in (4, 8))
    images.requires_grad_()
    texts.requires_grad_()
    labels = torch.tensor([7, 9, 7, 3])
    scale = torch.tensor(5.0, requires_grad=True)
    found = ContrastiveMatch().loss(images, texts, labels, scale)
    right = labels[:, None] == labels.repeat(2)[None]
    with torch.no_grad():
        expected = (by_hand(images, texts, right, 5.0) + by_hand(texts, images, right.T, 5.0)) / 2
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    found.backward()
    for one in (images, texts, scale):
        assert one.grad is not None
        assert one.grad.abs().sum() > 0
    assert images.grad is not None
    assert (images.grad.abs().sum(1) > 0).all()


def test_recall_counts_pictures_of_the_concept():
    vectors = torch.eye(12)
    figures = ContrastiveMatch().recall(vectors, vectors.roll(1, 0), torch.arange(12))
    assert figures == {"text_recall@10": 0, "image_recall@10": 0}
    same = ContrastiveMatch().recall(vectors, vectors.roll(1, 0), torch.zeros(12, dtype=torch.int64))
    assert same == {"text_recall@10": 1, "image_recall@10": 1}


def test_a_training_finds_pictures_by_their_texts(tmp_path, capsys):
    """By the command line: a mix of drawing and matching, after which recall at 1 is far above chance."""
    workspace = write_workspace(tmp_path)
    parts = {"train": range(64), "test-family": range(64, 104)}
    items = {
        split: [CodedSample(sample(n, concept=f"c{n % CONCEPTS}"), coded(n).codes) for n in numbers]
        for split, numbers in parts.items()
    }
    codes = write_codes(tmp_path / "matched", items)
    settings = {
        "data": {"codes": str(codes), "text_model": str(workspace / "text.model"), "test": ["test-family"]},
        "model": {
            "num_image_codes": CODES, "width": 32, "depth": 1, "heads": 2, "max_text": 12, "match": {"width": 16},
        },
        "mix": {"draw": 0.2, "match": 0.8},
        "match": {"texts": 2},
        "packing": False,
        "loop": {
            "out": str(tmp_path / "out"), "precision": "float32", "device": "cpu", "minutes": 0, "steps": 60,
            "batch_size": 16, "learning_rate": 1e-2, "warmup": 2, "log_every": 10, "eval_every": 60,
        },
    }  # fmt: skip
    (tmp_path / "match.yaml").write_text(yaml.safe_dump(settings))
    assert run(["train", "generator", str(tmp_path / "match.yaml")]) == 0
    capsys.readouterr()
    losses = logged(tmp_path / "out", "train/match_loss")
    assert losses[-1] < losses[0]
    assert logged(tmp_path / "out", "train/temperature")[-1] != pytest.approx(0.07, abs=1e-6)
    assert logged(tmp_path / "out", "test/test-family/text_recall@10")
    model = load_part(Transformer, tmp_path / "out" / "generator").float()
    config = make_config(workspace, tmp_path / "none")
    pairs = CodedPairs(codes, "test-family")
    maker = RowMaker(TextTokenizer(workspace / "text.model"), model.config, config)
    with torch.no_grad():
        found = [model.match(batch) for batch in held_out_batches(pairs, maker, "match", named_style=False)]
    images, texts = (torch.cat(vectors) for vectors in zip(*found, strict=True))
    labels = torch.tensor([n % CONCEPTS for n in range(64, 104)])
    for queries, candidates in ((texts, images), (images, texts)):
        assert recall_figures(ranks(queries, candidates, labels, labels))["recall@1"] > 4 / CONCEPTS


# as towers


@pytest.fixture(scope="module")
def towers(matching_model_dir: Path) -> GeneratorTowers:
    made = load_vector_maker("generator", matching_model_dir, "cpu")
    assert isinstance(made, GeneratorTowers)
    return made


TEXTS = ["红心", "a red apple", "", "ein schlafendes Gesicht mit Sonnenbrille " * 5]


def pictures() -> list[Image.Image]:
    colours = Image.linear_gradient("L").resize((50, 40))
    return [Image.merge("RGB", [colours, colours.rotate(90 * k), colours]) for k in range(3)]


@torch.no_grad()
def test_vectors_are_those_of_rows_in_training(towers):
    rows, text, generator = towers.rows, towers.text, towers.generator
    codes = [towers.tokenizer.encode(to_tensor(to_square(one, 32))[None])[0] for one in pictures()]
    parts = [[rows.picture_row(one), *(rows.text_row(text.encode(said)) for said in TEXTS)] for one in codes]
    batch = collate(generator.config.vocabulary, [matched_row(some, 0) for some in parts])
    images, texts = generator.match(batch)
    torch.testing.assert_close(towers.encode_image(pictures()), images, atol=1e-5, rtol=1e-5)
    found = towers.encode_text(TEXTS)
    torch.testing.assert_close(found, texts[::3], atol=1e-5, rtol=1e-5)
    assert (found.shape, found.dtype, towers.embed_dim, towers.image_size) == ((4, 8), torch.float32, 8, 32)
    for one, vector in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(towers.encode_text([one])[0], vector, atol=1e-6, rtol=1e-5)


def test_tokens_are_counted_and_what_is_cut_is_told(towers, caplog):
    tokens = towers.tokenize(TEXTS)
    counts = towers.count_tokens(tokens)
    assert counts[2] == 2  # [ROI1] [ENC]
    assert counts[3] == towers.generator.config.max_text + 2
    assert "1 of 4 texts are cut" in caplog.text
    assert float(towers.scale.detach()) == pytest.approx(1 / 0.07, rel=0.01)


def test_the_choice_has_one_home(towers, matching_model_dir, tiny_model_dir, tmp_path):
    again = load_vector_maker("generator", matching_model_dir, "cpu", "bfloat16")
    assert again.encode_text(["x"]).dtype == torch.float32
    assert content_hash(again) != content_hash(towers)
    cases: list[tuple[VectorMaker, Path | str, str]] = [
        ("generator", tiny_model_dir, "tiny' makes no vectors: leave out --by generator, or train one with"),
        ("generator", "emoji", "the generator of 'emoji' makes no vectors"),
        ("generator", matching_model_dir / "generator", "a part alone: --by generator takes a whole model"),
        ("generator", tmp_path / "nothing", "no model"),
        ("towers", matching_model_dir, "has no towers"),
    ]
    for by, model, problem in cases:
        with pytest.raises(ModelError, match=problem):
            load_vector_maker(by, model, "cpu")
    with pytest.raises(ModelError, match="not in 'int8'"):
        load_vector_maker("generator", matching_model_dir, "cpu", "int8")
