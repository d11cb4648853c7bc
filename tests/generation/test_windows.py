"""Passes over several codes (`generation.drawing.jacobi`): what a branch sees, and what it saves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from generation.drawing import window_cache
from generation.drawing.decoding import generate_codes
from generation.drawing.prompts import PaddedPrompts, pad_prompts
from generation.drawing.sampling import SamplingOptions
from generation.drawing.window_cache import WindowCache, branches_of
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from tests.helpers.generators import GRID, PRESETS, PROMPTS, SEEDS, make_model

# Janus' row: positions along it, keys shared by heads, a head with a layer between
ROW = TransformerConfig.modern(
    num_image_codes=32, num_text_pieces=50, width=64, depth=2, heads=4, kv_heads=2, max_text=6, grid=GRID,
    position="rotary_1d", qk_norm=False, image_head="mlp",
)  # fmt: skip
MODELS = {**{name: PRESETS[name] for name in ("modern", "cogview")}, "row": ROW}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return make_model(MODELS[request.param])


@torch.inference_mode()
def test_a_branch_sees_what_the_token_sees_that_it_stands_for(model: Transformer) -> None:
    """Two rows that stand at different places, three branches; then one of them is kept, in one row."""
    prompts = pad_prompts(model.config, PROMPTS[:2], GRID)
    slots, codes = prompts.slots, (torch.arange(32).view(2, 16) * 7) % 32
    tokens = torch.cat([prompts.tokens, codes], dim=1)
    cache = WindowCache(model.config, prompts.hidden, dtype=torch.float32, device="cpu", branches=3)
    model(tokens[:, : slots + 5], prompts.positions[:, : slots + 5], cache)

    starts, depths = torch.tensor([slots + 2, slots + 4]), torch.tensor([[0, 2, 1], [1, 3, 0]])
    rivals = torch.tensor([[30, 31, 29], [28, 27, 26]])
    rows, main = torch.arange(2)[:, None], torch.arange(5)
    cache.starts = starts
    cache.branch_at(depths)
    read = torch.cat([tokens[rows, starts[:, None] + main], rivals], dim=1)
    places = torch.cat([starts[:, None] + main, starts[:, None] + depths + 1], dim=1)
    found = model(read, prompts.positions[rows, places], cache)

    plain = _plain(model, prompts, tokens)
    for row in range(2):
        wanted = plain[row, starts[row] : starts[row] + 5]
        torch.testing.assert_close(found[row, :5], wanted, atol=2e-5, rtol=1e-5)
        for branch in range(3):
            place = int(starts[row] + depths[row, branch] + 1)
            other = tokens.clone()
            other[row, place] = rivals[row, branch]
            wanted = _plain(model, prompts, other)[row, place]
            torch.testing.assert_close(found[row, 5 + branch], wanted, atol=2e-5, rtol=1e-5)
            assert not torch.allclose(wanted, plain[row, place], atol=1e-2)

    cache.keep_branch(torch.tensor([True, False]), torch.tensor([1, 0]))
    other = tokens.clone()
    other[0, starts[0] + 3] = rivals[0, 1]
    cache.starts = starts + 4
    places = torch.cat([cache.starts[:, None] + main, cache.starts[:, None] + depths + 1], dim=1)
    read = torch.cat([other[rows, cache.starts[:, None] + main], rivals], dim=1)
    found, wanted = model(read, prompts.positions[rows, places], cache), _plain(model, prompts, other)
    for row in range(2):
        start = int(cache.starts[row])
        torch.testing.assert_close(found[row, :5], wanted[row, start : start + 5], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [9, 16])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_branches_draw_the_same_pictures(model: Transformer, size: int, guidance: float) -> None:
    options = SamplingOptions(temperature=0.7, top_k=12, guidance=guidance)
    expected = generate_codes(model, PROMPTS[:5], SEEDS[:5], options, grid=GRID)
    given = torch.where(torch.arange(16).view(GRID) % 5 == 2, expected, -1)
    for kept in (None, given):
        found = generate_codes(
            model, PROMPTS[:5], SEEDS[:5], replace(options, window=size), grid=GRID, given_codes=kept
        )
        assert torch.equal(found, expected)


def test_branches_save_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many places of the window, with a third as many branches beside them and without."""
    model, options = make_model(MODELS["modern"]), SamplingOptions(temperature=0.7, top_k=12)

    def passes(window: int) -> int:
        told: list[int] = []
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
            generate_codes(model, [prompt], [seed], replace(options, window=window), grid=GRID,
                           on_token=lambda step, codes: told.append(step))  # fmt: skip
        return len(told)

    assert branches_of(16) == 4
    with_branches = passes(16)
    monkeypatch.setattr(window_cache, "SMALLEST", 10**6)
    assert branches_of(16) == 0
    assert with_branches < passes(12)


def _plain(model: Transformer, prompts: PaddedPrompts, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states of whole rows, with the padding hidden."""
    cache = WindowCache(model.config, prompts.hidden, dtype=torch.float32, device="cpu")
    return model(tokens[:, :-1], prompts.positions[:, : tokens.shape[1] - 1], cache)
