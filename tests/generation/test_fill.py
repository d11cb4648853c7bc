"""Holes: which codes are hidden, the row that is learned, and drawing of the holes alone."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from generation.drawing.decoding import count_steps, generate_codes, known_codes
from generation.drawing.engines import Engine
from generation.drawing.logits import draw_noise, guide, sample
from generation.drawing.sampling import SamplingOptions
from generation.rows.draw import training_row
from generation.rows.fill import with_holes
from generation.rows.holes import HoleKind, draw_holes, hidden_codes
from generation.transformer.model import Transformer
from tests.helpers.generators import GRID, PRESETS, PROMPTS, SEEDS, make_model

KINDS = get_args(HoleKind)
GUIDED = SamplingOptions(temperature=0.9, top_p=0.9, guidance=2.0)


def filling(preset: str = "modern") -> Transformer:
    return make_model(replace(PRESETS[preset], fills=True))


def codes_with_holes(hidden: Tensor, count: int) -> Tensor:
    codes = torch.randint(32, (count, *GRID), generator=torch.Generator().manual_seed(3))
    return codes.masked_fill(hidden, -1)


# masks


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_hides_its_share_and_is_the_same_each_time(kind):
    for share in (0.1, 0.3, 0.77, 1.0):
        hidden = hidden_codes((12, 16), kind, share, random.Random(5))
        assert int(hidden.sum()) == round(share * 12 * 16)
        assert torch.equal(hidden, hidden_codes((12, 16), kind, share, random.Random(5)))
    others = {tuple(hidden_codes((12, 16), kind, 0.3, random.Random(k)).flatten().tolist()) for k in range(10)}
    assert len(others) == 10
    assert int(hidden_codes((1, 1), kind, 0.1, random.Random(0)).sum()) == 1


def test_the_kinds_have_their_shapes():
    hidden = hidden_codes((16, 16), "box", 0.25, random.Random(1))
    rows, columns = hidden.any(dim=1).nonzero()[:, 0], hidden.any(dim=0).nonzero()[:, 0]
    box = hidden[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert box.float().mean() > 0.8  # but for the last line, which may be cut
    patches = hidden_codes((16, 16), "patches", 0.5, random.Random(1))
    inside = patches[:, 1:] == patches[:, :-1]  # neighbours mostly share a patch
    assert 0.7 < inside.float().mean() < 1
    plane = hidden_codes((16, 16), "half_plane", 0.4, random.Random(1))
    assert all(len(row.diff().nonzero()) <= 1 for row in [*plane.int(), *plane.int().T])


def test_shares_are_uniform_and_all_kinds_come_up():
    rng = random.Random(0)
    shares = torch.tensor([draw_holes((8, 8), rng).float().mean() for _ in range(400)])
    assert 0.09 < shares.min() < 0.15 < 0.9 < shares.max() <= 1
    assert 0.5 < shares.mean() < 0.6


# rows


def test_a_row_learns_the_holes_and_its_text():
    config = PRESETS["modern"]
    codes = torch.arange(16).view(GRID)
    row = training_row(config.vocabulary, [1, 2, 3], codes, config.max_text)
    hidden = torch.zeros(GRID, dtype=torch.bool)
    hidden[1, 1:3] = hidden[2, 0] = hidden[3, 3] = True
    filled = with_holes(config.vocabulary, row, hidden)
    assert torch.equal(filled.tokens, row.tokens)
    assert filled.targets[filled.image_mask].tolist() == [5, 6, 8, 15]
    padding = config.vocabulary.command("[PAD]")
    assert int((filled.targets == padding).sum()) == 12
    assert torch.equal(filled.targets[:5], row.targets[:5])
    first = len(row.tokens) - 16
    assert filled.levels is not None
    assert filled.levels.tolist()[:first] == list(range(first))
    whole = with_holes(config.vocabulary, row, torch.ones(GRID, dtype=torch.bool))
    assert torch.equal(whole.targets, row.targets)
    assert whole.levels is not None
    assert torch.equal(whole.levels, torch.arange(len(row.tokens)))


# drawing


def naive_fill(model: Transformer, text: list[int], given: Tensor, seed: int, options: SamplingOptions) -> Tensor:
    """The holes of `given` [h, w], the whole row anew for every code."""
    config, codes, hidden = model.config, given.clamp_min(0), given < 0
    noise = draw_noise(seed, given.numel(), config.num_image_codes)
    for place in hidden.flatten().nonzero()[:, 0].tolist():
        logits = []
        for prompt in (text, []):
            row = training_row(config.vocabulary, prompt, codes, config.max_text, config.position_kind)
            row = with_holes(config.vocabulary, row, hidden)
            assert row.levels is not None
            seen = model(row.tokens[None], row.positions[None], levels=row.levels[None])[0]
            logits.append(model.logits(seen[place - given.numel() - 1], image_only=True).float()[None])
        both = guide(torch.cat(logits), options.guidance) if options.guidance != 1 else logits[0]
        codes.view(-1)[place] = sample(both, noise[place], options)[0]
    return codes


@pytest.mark.parametrize("preset", ["modern", "learned-2d", "cogview", "cogview-relaxed"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_holes_drawn_with_a_cache_are_those_of_the_whole_row(preset, kind):
    model = filling(preset)
    given = codes_with_holes(hidden_codes(GRID, kind, 0.5, random.Random(2)), 2)
    for options in (SamplingOptions(), GUIDED):
        found = generate_codes(model, PROMPTS[:2], SEEDS[:2], options, grid=GRID, given_codes=given)
        wanted = [naive_fill(model, *one, options) for one in zip(PROMPTS, given, SEEDS[:2], strict=False)]
        assert torch.equal(found, torch.stack(wanted))


def test_a_hole_of_three_tenths_takes_three_tenths_of_the_steps(monkeypatch):
    model, told, passes = filling(), [], []
    forward = Transformer.forward

    def counted(*arguments, **options):
        passes.append(arguments[1].shape[1])
        return forward(*arguments, **options)

    monkeypatch.setattr(Transformer, "forward", counted)
    hidden = hidden_codes(GRID, "blobs", 0.3, random.Random(0))
    given, options = codes_with_holes(hidden, 1), SamplingOptions()
    generate_codes(
        model, PROMPTS[:1], SEEDS[:1], options, grid=GRID, given_codes=given, engine=Engine("modules", 1),
        on_token=lambda step, codes: told.append((step, int((codes < 0).sum()))),
    )  # fmt: skip
    count = round(0.3 * 16)
    assert known_codes(given[0] >= 0, True) == 16 - count
    assert count_steps(1, options, GRID, known=16 - count) == count == 5
    assert told == [(k + 1, count - k - 1) for k in range(count)]
    assert passes.count(1) == count - 1  # the first needs the prefill alone
    assert len(passes) == count


def test_the_bits_of_a_picture_with_holes_do_not_depend_on_its_company():
    model = filling()
    hidden = hidden_codes(GRID, "patches", 0.4, random.Random(3))
    given = codes_with_holes(hidden, 12)
    for engine in (Engine("auto"), Engine("modules")):
        found = generate_codes(model, PROMPTS, SEEDS, GUIDED, grid=GRID, given_codes=given, engine=engine)
        assert torch.equal(found[:, ~hidden], given[:, ~hidden])
        for k in (0, 3, 11):
            one = slice(k, k + 1)
            alone = generate_codes(
                model, PROMPTS[one], SEEDS[one], GUIDED, grid=GRID, given_codes=given[one], engine=engine
            )
            assert torch.equal(alone[0], found[k])


def test_a_window_changes_nothing():
    model = filling()
    given = codes_with_holes(hidden_codes(GRID, "half_plane", 0.6, random.Random(3)), 2)
    drawn = [
        generate_codes(model, PROMPTS[:2], SEEDS[:2], replace(GUIDED, window=w), grid=GRID, given_codes=given)
        for w in (1, 5)
    ]
    assert torch.equal(*drawn)


def test_what_is_behind_a_hole_is_seen_by_a_model_that_fills_only():
    behind = codes_with_holes(torch.zeros(GRID, dtype=torch.bool), 1)
    behind[:, 0] = -1
    other = behind.clone()
    other[:, 2:] = (other[:, 2:] + 7) % 32
    for fills, same in ((True, False), (False, True)):
        model = make_model(replace(PRESETS["modern"], fills=fills))
        first, second = (
            generate_codes(model, PROMPTS[:1], SEEDS[:1], grid=GRID, given_codes=given)[:, 0]
            for given in (behind, other)
        )
        assert torch.equal(first, second) == same


def test_pictures_of_one_call_have_the_same_holes():
    given = codes_with_holes(torch.zeros(GRID, dtype=torch.bool), 2)
    given[0, 0, 0] = given[1, 3, 3] = -1
    with pytest.raises(ValueError, match="holes in different places"):
        generate_codes(filling(), PROMPTS[:2], SEEDS[:2], grid=GRID, given_codes=given)
