import math
import random

import pytest
import torch

from data.sample import Caption, Question, Sample
from generation.rows.base import CodedPicture, Given, RowRecipe
from generation.rows.draw import prompt_row, row_positions, training_row
from generation.rows.mixture import ROW_KINDS, Mixture
from generation.rows.noise import with_noise
from generation.rows.row import collate
from generation.rows.texts import CaptionMix
from generation.rows.vocabulary import COMMANDS, Vocabulary
from generation.transformer.config import TransformerConfig

VOCAB = Vocabulary(num_image_codes=64, num_text_pieces=100)


def test_vocabulary_is_codes_then_text_then_commands():
    assert (VOCAB.size, VOCAB.padded_size) == (191, 256)
    assert VOCAB.image_range == range(0, 64)
    assert VOCAB.text_range == range(64, 164)
    assert VOCAB.command_range == range(164, 191)
    assert [VOCAB.command(name) for name in COMMANDS] == list(VOCAB.command_range)
    assert VOCAB.text([0, 99]) == [64, 163]


def test_published_cogview_ids():
    published = Vocabulary(num_image_codes=8192, num_text_pieces=50000)
    assert (published.size, published.padded_size) == (58219, 58240)
    names = ["[PAD]", "[BOI1]", "[EOI1]", "[ROI1]", "[BASE]", "[POS0]"]
    assert [published.command(name) for name in names] == [58192, 58193, 58196, 58199, 58208, 58210]


@pytest.mark.parametrize(
    ("grid", "name"),
    [((8, 8), "[TINY]"), ((4, 6), "[TINY]"), ((12, 12), "[SMALL]"), ((16, 8), "[SMALL]"), ((32, 32), "[BASE]"),
     ((64, 64), "[BIG]")],
)  # fmt: skip
def test_size_command_is_the_smallest_that_holds_the_grid(grid, name):
    assert VOCAB.size_command(grid) == VOCAB.command(name)


@pytest.mark.parametrize("grid", [(65, 8), (0, 8)])
def test_a_grid_without_a_size_is_refused(grid):
    with pytest.raises(ValueError, match="no size command"):
        VOCAB.size_command(grid)


def test_ids_outside_the_vocabulary_are_refused():
    for pieces in ([100], [-1]):
        with pytest.raises(ValueError, match=r"0\.\.99"):
            VOCAB.text(pieces)
    with pytest.raises(ValueError, match="not a command"):
        VOCAB.command("[NEXT]")


def test_training_row_spells_the_sequence():
    codes = torch.tensor([[1, 2, 3], [4, 5, 6]])
    row = training_row(VOCAB, [7, 8], codes, max_text=5)
    names = {name: VOCAB.command(name) for name in ("[ROI1]", "[TINY]", "[BOI1]", "[EOI1]")}
    whole = [names["[ROI1]"], 71, 72, names["[TINY]"], names["[BOI1]"], 1, 2, 3, 4, 5, 6, names["[EOI1]"]]
    assert row.tokens.tolist() == whole[:-1]
    assert row.targets.tolist() == whole[1:]
    assert row.image_mask.tolist() == [False] * 4 + [True] * 6 + [False]
    assert len(row.positions) == len(row.tokens)


def test_prompt_is_the_start_of_the_training_row_and_long_text_is_cut():
    text = list(range(20))
    row = training_row(VOCAB, text, torch.zeros(8, 8), max_text=5)
    prompt = prompt_row(VOCAB, text, (8, 8), max_text=5)
    assert prompt == row.tokens[:8].tolist()
    assert len(prompt) == 5 + 3
    assert prompt_row(VOCAB, [], (8, 8), max_text=5) == [prompt[0], *prompt[-2:]]


def test_sequence_positions_count():
    assert row_positions(3, (2, 2), max_text=9, kind="sequence").tolist() == list(range(3 + 4 + 4))


def test_grid_positions_of_codes_do_not_depend_on_the_text():
    origin = 9 + 4
    for num_text in (0, 9):
        positions = row_positions(num_text, (2, 3), max_text=9, kind="grid")
        before = num_text + 3
        assert positions[:before].tolist() == [[t, t] for t in range(before)]
        cells = [[origin + r, origin + c] for r in range(2) for c in range(3)]
        assert positions[before:].tolist() == [*cells, [origin + 2, origin + 3]]
        assert before <= origin  # text never reaches the picture's positions


@pytest.mark.parametrize("kind", ["sequence", "grid"])
def test_collate_pads_at_the_end_and_weighs_the_targets(kind):
    codes = torch.arange(4).view(2, 2)
    short = training_row(VOCAB, [1], codes, 5, kind)
    long = training_row(VOCAB, [1, 2, 3], codes, 5, kind)
    batch = collate(VOCAB, [short, long], text_weight=0.25)
    assert batch.tokens.shape == batch.targets.shape == batch.weights.shape == (2, 10)
    assert batch.positions.shape == ((2, 10) if kind == "sequence" else (2, 10, 2))
    pad = VOCAB.command("[PAD]")
    assert batch.tokens[0, 8:].tolist() == batch.targets[0, 8:].tolist() == [pad, pad]
    assert torch.equal(batch.tokens[0, :8], short.tokens)
    assert torch.equal(batch.positions[1], long.positions)
    # text, [SIZE], [BOI1] | four codes | [EOI1] | padding
    assert batch.weights[0].tolist() == [0.25] * 3 + [1.0] * 4 + [0.25] + [0.0] * 2
    assert batch.image_mask[0].tolist() == [False] * 3 + [True] * 4 + [False] * 3
    assert (batch.targets[batch.image_mask] < 64).all()
    assert (batch.targets[~batch.image_mask] >= 64).all()


def test_unusable_rows_are_refused():
    with pytest.raises(ValueError, match="at least one row"):
        collate(VOCAB, [])
    with pytest.raises(ValueError, match=r"\[h, w\]"):
        training_row(VOCAB, [1], torch.zeros(64), 5)


def test_noise_changes_given_codes_alone():
    codes, other = torch.arange(1, 37).view(6, 6), torch.full((6, 6), 60)
    row = training_row(VOCAB, [7, 8], codes, max_text=5)
    noisy = with_noise(row, other, 0.4, torch.Generator().manual_seed(0))
    changed = noisy.tokens != row.tokens
    assert 5 <= int(changed.sum()) <= 25
    assert (noisy.tokens[changed] == 60).all()
    assert (row.tokens[changed] < VOCAB.num_image_codes).all()
    for name in ("targets", "positions", "image_mask"):
        assert torch.equal(getattr(noisy, name), getattr(row, name))
    # a code is taken from the same place
    all_of_it = with_noise(row, codes + 20, 1.0, torch.Generator())
    assert all_of_it.tokens[row.tokens < VOCAB.num_image_codes].tolist() == list(range(21, 57))
    assert with_noise(row, other, 0.0, torch.Generator()).tokens.tolist() == row.tokens.tolist()


# the mixture of row kinds


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 1 / 3, 1.0])
def test_describing_takes_the_lowest_part_of_the_random_numbers(share):
    mixture = Mixture({"draw": 1 - share, "describe": share})
    rng = random.Random(0)
    for chance in [0.0, *(rng.random() for _ in range(1000))]:
        assert mixture.pick(chance) == ("describe" if chance < share else "draw")


def test_weights_are_normalised_in_any_order():
    mixture = Mixture({"describe": 6, "draw": 2})
    assert mixture.shares == {"draw": 0.25, "describe": 0.75}
    assert Mixture({"draw": 3.0, "describe": 0}).shares == {"draw": 1.0}
    assert Mixture({"draw": 3.0}).pick(math.nextafter(1, 0)) == "draw"


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ({"draw": 1.0, "sing": 1.0}, "mix: unknown kind of rows 'sing'; use draw, describe, fill, answer, match$"),
        ({"draw": 1.0, "describe": -0.5}, r"mix\.describe must be a number of at least 0, not -0\.5$"),
        ({"draw": math.nan}, r"mix\.draw must be a number"),
        ({"draw": 0.0}, "mix needs a kind of rows with a weight above 0$"),
        ({}, "mix needs"),
    ],
)
def test_impossible_mixtures_are_refused(weights, problem):
    with pytest.raises(ValueError, match=problem):
        Mixture(weights)


@pytest.mark.parametrize("kind", ROW_KINDS)
@pytest.mark.parametrize("preset", [TransformerConfig.cogview, TransformerConfig.modern])
def test_a_prompt_is_the_start_of_a_row_of_its_kind(kind, preset):
    codes, words = torch.arange(6).view(2, 3), {"red": [7, 8]}
    rows = ROW_KINDS[kind](preset(num_image_codes=64, num_text_pieces=100, max_text=5, grid=(2, 3)))
    sample = Sample("a", b"", "png", {"en": Caption("red")}, questions=(Question("en", "red", "nothing"),))
    picture = CodedPicture(sample, codes)
    recipe = RowRecipe(WordEncoder(words), CaptionMix())
    row = rows.held_out_row(picture, recipe, named_style=False)
    text = words["red"] if kind != "describe" else []
    prompt = rows.prompt(Given(text, (2, 3), codes))
    assert row.tokens[: len(prompt)].tolist() == prompt
    positions = rows.positions(2, (2, 3))
    # a row that is matched predicts nothing, so that its last token is in it
    assert torch.equal(row.positions, positions if kind == "match" else positions[:-1])
    assert len(prompt) < len(positions)


class WordEncoder:
    """Words to raw text pieces; a language in front of them has none."""

    def __init__(self, words: dict[str, list[int]]) -> None:
        self.words = words

    def encode(self, text: str) -> list[int]:
        return [piece for word in text.split() for piece in self.words.get(word, [])]


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_a_row_kind_says_what_it_needs(kind):
    rows = ROW_KINDS[kind](TransformerConfig.modern(num_image_codes=64, num_text_pieces=100))
    assert rows.suits(Sample("a", None, "", {"en": Caption("red")}, questions=(Question("en", "what?", "red"),)))
    assert rows.suits(Sample("b", None, "")) == (kind not in ("describe", "answer", "match"))
