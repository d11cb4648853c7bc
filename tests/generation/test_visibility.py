"""One rule says who sees whom: it equals, element by element, the masks of every kind of row and of the originals."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from generation.rows.fill import with_holes
from generation.rows.holes import hidden_codes
from generation.rows.noise import with_noise
from generation.rows.row import Row, collate, pack
from generation.transformer.attention import DenseAttention
from generation.transformer.model import Transformer
from generation.transformer.views import DenseView, FlexView
from generation.transformer.visibility import Visibility
from tests.helpers.packed_rows import PRESETS, rows_of

CONFIG = PRESETS["modern"]
SIDE = CONFIG.grid[0]


def visible(levels: list[int]) -> Tensor:
    return Visibility.of(torch.zeros(1, len(levels), dtype=torch.int64), torch.tensor([levels])).visible()[0]


def rows_with_holes(count: int = 5, share: float = 0.5) -> list[Row]:
    rows = rows_of(CONFIG, count=count)
    holes = [hidden_codes(CONFIG.grid, "patches", share, random.Random(k)) for k in range(count)]
    return [with_holes(CONFIG.vocabulary, row, hidden) for row, hidden in zip(rows, holes, strict=True)]


def levels_of(row: Row) -> Tensor:
    assert row.levels is not None
    return row.levels


# the masks of rows


def test_a_causal_row():
    row = rows_of(CONFIG)[0]
    expected = torch.ones(len(row.tokens), len(row.tokens), dtype=torch.bool).tril()
    assert torch.equal(Visibility.of(row.tokens[None]).visible()[0], expected)
    masked = with_noise(row, torch.full(CONFIG.grid, CONFIG.vocabulary.command("[MASK]")), 0.7, torch.Generator())
    assert torch.equal(Visibility.of(masked.tokens[None], masked.levels, masked.segments).visible()[0], expected)


def test_a_row_that_describes():
    row = rows_of(CONFIG, describe=True)[0]
    assert row.segments is not None
    segments = row.segments.tolist()
    assert max(segments) == 3
    found = Visibility.of(row.tokens[None], None, row.segments[None]).visible()[0]
    for i, own in enumerate(segments):
        for j, other in enumerate(segments):
            assert bool(found[i, j]) == (j <= i and other in (0, own))


def test_the_picture_of_coglm():
    """CogView2's `make_image_text_understanding`: the causal mask, kept rows cleared, kept columns set."""
    side, patch, rng = 20, 4, random.Random(0)
    kept = torch.ones(side, side, dtype=torch.bool)
    for corner in rng.sample(range((side - patch) ** 2), k=int(0.8 * side**2 / patch**2)):
        x, y = divmod(corner, side - patch)
        kept[x : x + patch, y : y + patch] = False
    flat = kept.flatten()
    expected = torch.ones(side**2, side**2).tril()
    expected = expected.masked_fill(flat.unsqueeze(1), 0).masked_fill(flat.unsqueeze(0), 1).bool()
    assert torch.equal(visible([0 if k else i + 1 for i, k in enumerate(flat.tolist())]), expected)


def test_the_text_of_coglm():
    """`make_text_understanding`: all see what is outside the spans; in a span, and one token further, it is causal."""
    length, spans = 40, [(3, 2), (10, 5), (30, 1)]
    expected, end, slices = torch.ones(length, length).tril(), 0, []
    for start, span in spans:
        expected[end:start] = 0
        slices.append(slice(end, start))
        end = start + span + 1
    for one in slices:
        expected[:, one] = 1
    given = {i for one in slices for i in range(one.start, one.stop)}
    assert torch.equal(visible([0 if i in given else i + 1 for i in range(length)]), expected.bool())


def test_the_parts_of_glm():
    """Part A sees Part A; a token of Part B, the spans moved behind, sees Part A and Part B up to itself."""
    part_a, part_b = 12, 7
    found = visible([0] * part_a + list(range(1, part_b + 1)))
    for i in range(part_a + part_b):
        for j in range(part_a + part_b):
            assert bool(found[i, j]) == (j < part_a or (i >= part_a and j <= i))


def test_a_row_with_holes():
    row = rows_with_holes(1)[0]
    before, picture = len(row.tokens) - SIDE * SIDE, levels_of(row)[-SIDE * SIDE :]
    found, kept = Visibility.of(row.tokens[None], levels_of(row)[None]).visible()[0], picture == before - 1
    assert kept.sum() == SIDE * SIDE / 2
    for i in range(len(row.tokens)):
        hole = i >= before and not kept[i - before]
        for j in range(len(row.tokens)):
            seen_by_pictures = j < before or bool(kept[j - before])
            expected = j <= i if i < before - 1 else seen_by_pictures or (hole and j <= i)
            assert bool(found[i, j]) == expected


def test_padding_is_seen_by_no_row_and_packed_rows_do_not_see_each_other():
    rows = rows_with_holes(3)
    padded, packed = collate(CONFIG.vocabulary, rows), pack(CONFIG.vocabulary, rows)
    of_padded = Visibility.of(padded.tokens, padded.levels).visible()
    whole = Visibility.of(packed.tokens, packed.levels, None, packed.lengths)
    of_packed, start = whole.visible()[0], 0
    assert packed.lengths is not None
    for k, (row, part) in enumerate(zip(rows, whole.split(packed.lengths), strict=True)):
        end, alone = len(row.tokens), Visibility.of(row.tokens[None], levels_of(row)[None]).visible()[0]
        assert torch.equal(of_padded[k, :end, :end], alone)
        assert not of_padded[k, :end, end:].any()
        here = slice(start, start + end)
        assert torch.equal(of_packed[here, here], alone)
        assert torch.equal(part.visible()[0], alone)
        assert of_packed[here].sum() == alone.sum()
        start += end


# attention by the rule


def some_batches() -> dict[str, Visibility]:
    holes, told = (pack(CONFIG.vocabulary, rows) for rows in (rows_with_holes(8), rows_of(CONFIG, True, 8)))
    padded = collate(CONFIG.vocabulary, rows_with_holes(3))
    return {
        "packed holes": Visibility.of(holes.tokens, holes.levels, holes.segments, holes.lengths),
        "packed describing": Visibility.of(told.tokens, told.levels, told.segments, told.lengths),
        "padded holes": Visibility.of(padded.tokens, padded.levels, padded.segments),
    }


@pytest.mark.parametrize("name", ["packed holes", "packed describing", "padded holes"])
def test_the_block_mask_is_the_bias(name):
    from torch.nn.attention.flex_attention import create_mask

    visibility = some_batches()[name]
    count, length = visibility.levels.shape
    mask = create_mask(visibility.mask_mod(), count, 1, length, length, device="cpu")
    assert torch.equal(mask[:, 0], visibility.visible())
    assert torch.equal(visibility.bias()[:, 0] == 0, visibility.visible())
    q, k, v = torch.randn(3, count, 2, length, 16, generator=torch.Generator().manual_seed(0)).unbind()
    dense = DenseAttention(CONFIG).eval()
    expected = DenseView(dense, None, visibility.bias()).attend(q, k, v)
    found = FlexView(dense, None, visibility.block_mask()).attend(q, k, v)
    torch.testing.assert_close(found, expected)
    # a head of keys that two heads of queries share
    shared = DenseView(dense, None, visibility.bias()).attend(q, k[:, :1], v[:, :1])
    found = FlexView(dense, None, visibility.block_mask()).attend(q, k[:, :1], v[:, :1])
    torch.testing.assert_close(found, shared)


def test_packed_padded_and_single_rows_with_holes_are_the_same():
    torch.manual_seed(0)
    model, rows = Transformer(CONFIG).eval(), rows_with_holes()
    padded, packed = collate(CONFIG.vocabulary, rows, 0.3), pack(CONFIG.vocabulary, rows, 0.3)
    with torch.no_grad():
        one_by_one = torch.cat([model(r.tokens[None], r.positions[None], levels=levels_of(r)[None])[0] for r in rows])
        together = model(packed.tokens, packed.positions, lengths=packed.lengths, levels=packed.levels)[0]
        beside = model(padded.tokens, padded.positions, levels=padded.levels)
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=1e-4)
    beside = torch.cat([hidden[: len(row.tokens)] for hidden, row in zip(beside, rows, strict=True)])
    torch.testing.assert_close(beside, one_by_one, atol=1e-5, rtol=1e-4)
    losses = [model.loss(batch) for batch in (padded, packed)]
    torch.testing.assert_close(losses[0], losses[1])
    losses[0]["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("describe", [False, True], ids=["fill", "describe"])
def test_a_gpu_takes_the_block_mask(describe):
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    rows = rows_of(CONFIG, True) if describe else rows_with_holes()
    batch = pack(CONFIG.vocabulary, rows, 0.3)
    expected = model.loss(batch)["loss"]
    expected.backward()
    assert model.embed.weight.grad is not None
    gradient = model.embed.weight.grad.clone()
    model.zero_grad()
    found = model.to("cuda").loss(batch.to("cuda"))["loss"]
    found.backward()
    assert model.embed.weight.grad is not None
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(model.embed.weight.grad.cpu(), gradient, atol=1e-3, rtol=1e-2)
