"""Questions to answers: rows, search, closed lists, and training."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy
import pytest
import torch

from data.codes import CodedSample
from data.sample import DataError, Question, Sample
from data.text import TextTokenizer
from generation.answers import answer, answer_log_probabilities
from generation.rows.answer import MOST_QUESTIONS, AnswerRows
from generation.rows.base import Chance, CodedPicture, Given, RowRecipe
from generation.rows.row import RowBatch, collate, pack
from generation.rows.texts import CaptionMix
from generation.training.batches import RowBatches, RowMaker, exact_answers, held_out_batches
from generation.training.pairs import CodedPairs
from generation.training.train_generator import train
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from tests.helpers.tiny_codes import logged, make_config, sample, write_codes, write_workspace
from vqvae.storage.parts import load_part

CODES = torch.arange(9).view(3, 3)


def small_model(**changes: object) -> Transformer:
    torch.manual_seed(3)
    settings = {"num_image_codes": 16, "num_text_pieces": 5, "width": 32, "depth": 2, "heads": 2, "max_text": 6}
    model = Transformer(TransformerConfig.modern(**{**settings, "grid": (3, 3), **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform
    return model.eval()


def test_a_row_that_answers_is_spelled_picture_first():
    rows = AnswerRows(TransformerConfig(num_image_codes=16, num_text_pieces=5, max_text=6, grid=(3, 3)))
    vocab = rows.format.vocabulary
    roi, sep, pad = (vocab.command(name) for name in ("[ROI1]", "[SEP]", "[PAD]"))
    row = rows.row([([1, 2], [3]), ([4], [0, 1])], CODES)
    picture = [vocab.command("[TINY]"), vocab.command("[BOI1]"), *range(9), vocab.command("[EOI1]")]
    assert row.tokens.tolist() == [*picture, roi, 17, 18, sep, 19, roi, 20, sep, 16, 17]
    # the answers alone are learned, and that they end
    assert row.targets.tolist() == [pad] * 12 + [pad, pad, pad, 19, sep] + [pad, pad, 16, 17, sep]
    assert row.segments is not None
    assert row.segments.tolist() == [0] * 12 + [1] * 5 + [2] * 5
    assert rows.prompt(Given([1, 2], (3, 3), CODES)) == [*picture, roi, 17, 18, sep]
    assert torch.equal(rows.positions(3, (3, 3))[:17], row.positions[:17])


@pytest.mark.parametrize("preset", [TransformerConfig.cogview, TransformerConfig.modern])
def test_a_question_is_cut_so_that_its_answer_has_room(preset):
    config = preset(num_image_codes=16, num_text_pieces=5, width=16, depth=1, heads=2, max_text=6, grid=(3, 3))
    rows = AnswerRows(config)
    row = rows.row([([1] * 9, [2, 3]), ([1], [2] * 9)], CODES)
    assert row.segments is not None
    # picture, then [ROI1] question [SEP] answer with 6 pieces at most, the separator among them
    assert [int((row.segments == number).sum()) for number in (1, 2)] == [1 + 3 + 1 + 2, 1 + 0 + 1 + 5]
    assert int(row.positions.max()) < config.num_positions
    Transformer(config).loss(collate(config.vocabulary, [row]))
    assert (rows.room([1] * 9), rows.room([1, 1])) == (1, 3)
    assert len(answer(small_model(), CODES, [1] * 9)[0].pieces) == 1
    with pytest.raises(ValueError, match=r"model\.max_text of 3 or more, not 2"):
        AnswerRows(replace(config, max_text=2))


@pytest.mark.parametrize("together", [collate, pack])
def test_questions_of_one_row_are_answered_as_alone(together):
    model = small_model()
    rows, vocab = AnswerRows(model.config), model.config.vocabulary
    asked = [([1, 2], [3]), ([4], [0, 1]), ([2], [2])]
    batch = together(vocab, [rows.row(asked, CODES), rows.row(asked[:2], CODES.flip(0))])
    apart = [(one, CODES) for one in asked] + [(one, CODES.flip(0)) for one in asked[:2]]
    with torch.no_grad():
        found, _ = losses(model, batch)
        alone = [losses(model, collate(vocab, [rows.row([one], codes)]))[0] for one, codes in apart]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-5)


def losses(model: Transformer, batch: RowBatch) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = model(batch.tokens, batch.positions, segments=batch.segments, lengths=batch.lengths)
    return model._cross_entropy(hidden, batch, batch.weights > 0, False)


def greedy(model: Transformer, question: list[int], codes: torch.Tensor = CODES) -> tuple[int, ...]:
    """Piece by piece, each by a whole pass over the row, without a cache."""
    rows, vocab = AnswerRows(model.config), model.config.vocabulary
    tokens = rows.prompt(Given(question, (3, 3), codes))
    room, start = rows.room(question), len(tokens)
    positions = rows.positions(len(question) + room, (3, 3))
    while len(tokens) < start + room:
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([tokens]), positions[None, : len(tokens)]))[0, -1]
        allowed = [*vocab.text_range, *([vocab.command("[SEP]")] if len(tokens) > start else [])]
        tokens.append(max(allowed, key=lambda token: float(logits[token])))
        if tokens[-1] == vocab.command("[SEP]"):
            return tuple(token - 16 for token in tokens[start:-1])
    return tuple(token - 16 for token in tokens[start:])


@pytest.mark.parametrize("position", ["rotary_2d", "sequence"])
def test_one_beam_is_greedy_search_and_one_pass_tells_its_answers(position):
    model = small_model(position=position)
    rows, questions = AnswerRows(model.config), [[1], [2, 3], [4, 4], [0, 1], [3], [2]]
    found = [answer(model, CODES, question)[0].pieces for question in questions]
    assert found == [greedy(model, question) for question in questions]
    # those that end by themselves, and each with another last piece
    right = [(q, pieces) for q, pieces in zip(questions, found, strict=True) if len(pieces) < rows.room(q)]
    assert right
    wrong = [(question, (*pieces[:-1], (pieces[-1] + 1) % 5)) for question, pieces in right]
    batch = collate(model.config.vocabulary, [rows.row(right + wrong, CODES), rows.row(wrong, CODES)])
    assert exact_answers(model, batch) == [[True] * len(right) + [False] * len(wrong), [False] * len(wrong)]


@pytest.mark.parametrize("position", ["rotary_2d", "sequence"])
def test_enough_beams_find_the_likeliest_of_all_answers(position):
    model, question = small_model(position=position, max_text=5), [2]
    texts = [rest for length in (1, 2, 3) for rest in itertools.product(range(5), repeat=length)]
    told = answer_log_probabilities(model, CODES, question, texts)
    steps: list[None] = []
    found = answer(model, CODES, question, beams=300, on_step=lambda: steps.append(None))
    assert len(steps) == 4
    expected = dict(zip(texts, told.tolist(), strict=True))
    assert found[0].pieces == max(expected, key=expected.__getitem__)
    assert len(found) == len(texts)
    for one in found:
        assert one.log_probability == pytest.approx(expected[one.pieces], abs=1e-4)
    with pytest.raises(ValueError, match="at least 1"):
        answer(model, CODES, question, beams=0)
    with pytest.raises(ValueError, match="no answer to choose from"):
        answer_log_probabilities(model, CODES, question, [])


def test_a_long_list_of_answers_is_scored_in_parts():
    model = small_model()
    texts = [list(text) for text in itertools.product(range(5), repeat=3)]
    calls: list[None] = []
    whole = answer_log_probabilities(model, CODES, [1], texts, on_step=lambda: calls.append(None))
    assert len(calls) == 2
    alone = torch.cat([answer_log_probabilities(model, CODES, [1], [text]) for text in texts[60:70]])
    torch.testing.assert_close(whole[60:70], alone, atol=1e-5, rtol=1e-5)


class Letters:
    """A piece for each of five letters."""

    def encode(self, text: str) -> list[int]:
        return ["abcde".index(letter) for letter in text if letter in "abcde"]


class Vectors:
    width = 3

    def of_text(self, text: str) -> torch.Tensor:
        raise AssertionError(text)

    def of_sample(self, id: str) -> torch.Tensor:
        return torch.full((1, 3), float(len(id)))


def test_rows_to_learn_from():
    rows = AnswerRows(TransformerConfig(num_image_codes=16, num_text_pieces=5, max_text=6, grid=(3, 3)))
    asked = tuple(Question("b", "c", "abcde"[n % 5]) for n in range(40))
    picture = CodedPicture(Sample("id", b"", "png", questions=asked), CODES)
    assert rows.suits(picture.sample)
    assert not rows.suits(sample(1))
    recipe = RowRecipe(Letters(), CaptionMix())
    row = rows.training_row(picture, recipe, Chance(random.Random(1), 0.5, lambda rng: CODES))
    assert row.segments is not None
    assert int(row.segments.max()) == MOST_QUESTIONS
    assert int((row.segments == 0).sum()) == 3 + 4  # half of the codes
    held_out = rows.held_out_row(picture, recipe, True)
    assert held_out.segments is not None
    assert int(held_out.segments.max()) == 40
    # the language, then the question
    assert rows.held_out_row(picture, recipe, True).tokens[12:17].tolist() == [32 - 4, 17, 18, 31, 16]
    seeing = replace(recipe, features=Vectors(), from_picture=0.5)
    vectors = rows.held_out_row(picture, seeing, True).features
    assert vectors is not None
    assert torch.equal(vectors, torch.full((40, 3), 2.0))


# training


def asked(number: int) -> CodedSample:
    """A picture of one code, and two questions about it."""
    questions = (Question("en", "which?", str(number % 4)), Question("en", "is it odd?", ["no", "yes"][number % 2]))
    grid = numpy.full((4, 4), number % 4, numpy.uint16)
    return CodedSample(sample(number, questions=questions), grid)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = write_workspace(tmp_path_factory.mktemp("asked"))
    text = ["en: which?", "en: is it odd?", "yes", "no", "0", "1", "2", "3"]
    TextTokenizer.train(text * 5, folder / "text.model", 300)
    write_codes(folder / "codes2", {"train": [*map(asked, range(40))], "test-family": [*map(asked, range(40, 50))]})
    return folder


def settings(workspace, out, mix, **loop):
    data = {"codes": str(workspace / "codes2"), "test": ["test-family"]}
    return replace(make_config(workspace, out, data=data, model={"width": 32, "max_text": 16}, **loop), mix=mix)


def test_a_generator_learns_to_answer(workspace, tmp_path):
    loop = {"steps": 120, "batch_size": 8, "learning_rate": 1e-2, "eval_every": 60, "log_every": 60}
    folder = train(settings(workspace, tmp_path, {"draw": 0.2, "answer": 0.8}, **loop))
    assert logged(tmp_path, "train/answer_bits")
    bits, right = (logged(tmp_path, f"test/test-family/answer_{name}") for name in ("bits", "accuracy"))
    assert bits[-1] < bits[0]
    assert right[-1] == 1.0
    assert not logged(tmp_path, "test/test-family/caption_bits")
    model, text = load_part(Transformer, folder).float().eval(), TextTokenizer(workspace / "text.model")
    for number in range(4):
        codes = torch.full((4, 4), number)
        (found,) = answer(model, codes, text.encode("en: which?"))
        assert text.decode(found.pieces).strip() == str(number)
        told = answer_log_probabilities(model, codes, text.encode("en: is it odd?"), [*map(text.encode, ("no", "yes"))])
        assert int(told.argmax()) == number % 2
        assert float(told.exp().sum()) == pytest.approx(1, abs=0.2)


def test_pictures_without_questions_are_not_asked_about(workspace, tmp_path, caplog):
    config = settings(workspace, tmp_path, {"answer": 1.0})
    coded = [asked(n) if n == 2 else replace(asked(n), sample=sample(n)) for n in range(4)]
    pairs = CodedPairs(write_codes(tmp_path / "some", {"train": coded}), "train")
    model = replace(config.model, num_text_pieces=400, grid=(4, 4))
    maker = RowMaker(TextTokenizer(workspace / "text.model"), model, config)
    ((batch, _), ids), *_ = RowBatches(pairs, maker)(0)
    assert caplog.messages == ["3 of 4 pictures have no question and are not used to answer"]
    assert set(ids) == {"s002"}
    assert batch.kind == batch.to("cpu").kind == "answer"
    assert [len(one.tokens) for one in held_out_batches(pairs, maker, "answer")] == [1]
    without = CodedPairs(write_codes(tmp_path / "none", {"train": coded[:2]}), "train")
    with pytest.raises(DataError, match=r"mix\.answer: no training picture has a question; set it to 0, or add quest"):
        RowBatches(without, maker)
    with pytest.raises(DataError, match="no held-out picture has a question, which rows of the kind 'answer' need"):
        held_out_batches(without, maker, "answer")
