"""Sparse attention over three regions: masked dense attention, the original's numbers, and where it is used."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from generation.transformer.attention import relaxed_attention
from generation.transformer.cache import KVCache
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from generation.transformer.sparse import draw_pivots, sparse_attention
from tests.helpers.cogview import GOLDEN, assert_close, load_generator

PAD = 164  # of the golden vocabulary


def dense_bias(pivots: torch.Tensor, length: int, window: int, windows: int) -> torch.Tensor:
    """[B, 1, S, S], key by key: 0 in the window, log(S // n) at pivots before it, minus infinity elsewhere."""
    rows, count = pivots.shape
    bias = torch.full((rows, 1, length, length), -torch.inf)
    for row in range(rows):
        chosen = set(pivots[row].tolist())
        for query in range(length):
            first = (query // window - windows + 1) * window
            for key in range(query + 1):
                if key >= first:
                    bias[row, 0, query, key] = 0
                elif key in chosen:
                    bias[row, 0, query, key] = math.log(max(1, length // count))
    return bias


def attend(q, k, v, bias):
    return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))


@pytest.mark.parametrize("length", [1, 7, 16, 33, 48, 61])
@pytest.mark.parametrize(("window", "windows", "count"), [(8, 2, 5), (16, 1, 20), (5, 3, 64), (64, 4, 3)])
def test_it_is_masked_dense_attention(length, window, windows, count):
    generator = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, 2, 3, length, 8, generator=generator, dtype=torch.float64).unbind(0)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    pivots = torch.rand(2, length, generator=generator).argsort(dim=1)[:, :count]
    found = sparse_attention(q, k, v, pivots, window, windows, attend)
    bias = dense_bias(pivots, length, window, windows).double()
    expected = attend(q, k, v, bias)
    torch.testing.assert_close(found, expected)
    probe = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((found * probe).sum(), (q, k, v))
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * probe).sum(), (q, k, v)))


def test_relaxation_knows_the_weight_of_pivots():
    q, k, v = torch.randn(3, 1, 2, 40, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    pivots = torch.tensor([[0, 3, 9]])

    def relaxed(q, k, v, bias):
        return relaxed_attention(q, k, v, bias, 32.0, 0.0)

    torch.testing.assert_close(
        sparse_attention(q, k, v, pivots, 8, 2, relaxed), sparse_attention(q, k, v, pivots, 8, 2, attend)
    )


def test_pivots_are_text_then_images_then_padding():
    torch.manual_seed(0)
    tokens = torch.tensor([[100, 1, 2, 101, 3, 4, 5, 102, PAD, PAD]])
    seen = set()
    for _ in range(50):
        pivots = draw_pivots(tokens, 64, PAD, 5)[0].tolist()
        assert len(set(pivots)) == 5
        assert set(pivots[:3]) == {0, 3, 7}
        assert set(pivots[3:]) <= {1, 2, 4, 5, 6}
        seen |= set(pivots[3:])
    assert seen == {1, 2, 4, 5, 6}
    assert set(draw_pivots(tokens, 64, PAD, 2)[0].tolist()) < {0, 3, 7}, "more text than pivots: some of it"
    assert sorted(draw_pivots(tokens, 64, PAD, 99)[0].tolist()) == list(range(10))


@pytest.mark.parametrize(("case", "count"), [("case0", 48), ("case1", 100)])
def test_the_originals_logits(tmp_path, monkeypatch, case, count):
    golden = load_file(GOLDEN / "transformer" / "sparse.safetensors")
    tokens = golden["tokens"]
    pivots = golden[f"{case}.pivot_idx"]  # [L, B, n]
    text = golden[f"{case}.txt_indices_bool"]
    drawn = draw_pivots(tokens, 64, PAD, count)
    for row in range(len(tokens)):
        # the original's are drawn by the same rule: all the text, then image codes
        places = text[row].nonzero().flatten().tolist()
        assert drawn[row, : len(places)].sort().values.tolist() == pivots[0, row, : len(places)].tolist() == places
        assert golden[f"{case}.img_indices_bool"][row, drawn[row, len(places) :]].all()

    dense = load_generator(tmp_path, "ckpt")
    config = dataclasses.replace(dense.config, dropout=0.0, sparse_window=16, sparse_windows=3, sparse_pivots=count)
    model = Transformer(config).train()
    model.load_state_dict(dense.state_dict())
    recorded = iter(pivots)
    monkeypatch.setattr("generation.transformer.views.draw_pivots", lambda *_: next(recorded))
    logits = model.logits(model(tokens, golden["position_ids"])).detach()
    assert next(recorded, None) is None, "one draw a layer"
    assert_close(logits[:, ::8], golden[f"{case}.logits"], 5e-5)
    plain = dense.logits(dense(tokens, golden["position_ids"])).detach()
    assert (plain[:, ::8] - golden[f"{case}.logits"]).abs().max() > 0.05


def make_model(**changes) -> Transformer:
    torch.manual_seed(0)
    sizes = {"num_image_codes": 64, "num_text_pieces": 100, "width": 32, "depth": 2, "heads": 2, "max_text": 8}
    return Transformer(TransformerConfig.modern(**{**sizes, "grid": (8, 8), "sparse_window": 8,
                                                   "sparse_windows": 2, "sparse_pivots": 16, **changes}))  # fmt: skip


def row(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(1))
    return tokens, torch.arange(length)[None, :, None].expand(2, -1, 2) % 12


@pytest.mark.parametrize("changes", [{}, {"pb_relax": 32.0}, {"dropout": 0.1}])
def test_gradients_reach_every_parameter(changes):
    model = make_model(**changes).train()
    tokens, positions = row(61)
    model.logits(model(tokens, positions)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.weight"):
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0


@torch.no_grad()
def test_only_training_is_sparse():
    """In eval mode and with a cache the same weights attend densely, as in the published inference scripts."""
    model, dense = make_model().train(), make_model(sparse_window=0).train()
    tokens, positions = row(61)
    expected = dense(tokens, positions)
    first, second = model(tokens, positions), model(tokens, positions)
    assert not torch.equal(first, second), "new pivots each time"
    assert not torch.allclose(first, expected, atol=1e-3)
    torch.testing.assert_close(first[:, :16], expected[:, :16])  # the first queries see everything before them
    torch.testing.assert_close(model(tokens[:, :16], positions[:, :16]), expected[:, :16], rtol=0, atol=1e-5)
    hidden = torch.zeros(2, 61, dtype=torch.bool)
    cache = KVCache(model.config, hidden, dtype=torch.float32, device="cpu")
    torch.testing.assert_close(model(tokens, positions, cache), expected)
    assert torch.equal(model.eval()(tokens, positions), dense.eval()(tokens, positions))


@pytest.mark.parametrize("change", [{"sparse_window": -1}, {"sparse_windows": 0}, {"sparse_pivots": 0}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        make_model(**change)
