import dataclasses
import json
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from generation.rows.draw import training_row
from generation.rows.row import collate
from generation.transformer.attention import relaxed_attention, rotate
from generation.transformer.cache import KVCache
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from tests.helpers.generators import PRESETS, SIZES, make_model


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by more threads, and lose a lot on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_batch(config: TransformerConfig, texts=((1, 2, 3), (4,)), text_weight=0.5):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for text in texts:
        codes = torch.randint(config.num_image_codes, config.grid, generator=generator)
        rows.append(training_row(config.vocabulary, text, codes, config.max_text, config.position_kind))
    return collate(config.vocabulary, rows, text_weight)


@pytest.fixture(params=PRESETS)
def config(request) -> TransformerConfig:
    return PRESETS[request.param]


def test_presets_differ_where_their_papers_do():
    cogview, modern = Transformer(PRESETS["cogview"]), Transformer(PRESETS["modern"])
    assert isinstance(cogview.blocks[0].mlp_out_norm, nn.LayerNorm)
    assert isinstance(modern.blocks[0].mlp_out_norm, nn.Identity)
    assert isinstance(modern.norm, nn.RMSNorm)
    assert not [name for name, _ in modern.named_parameters() if name.endswith("bias")]
    # parameter count of CogView: L (12 H^2 + 17 H) + V H + P H + 2 H
    width, depth, config = 64, 2, PRESETS["cogview"]
    expected = depth * (12 * width**2 + 17 * width) + (128 + config.max_length + 2) * width
    assert sum(parameter.numel() for parameter in cogview.parameters()) == expected


def test_no_token_sees_a_later_one(config):
    model, batch = make_model(config), make_batch(config)
    hidden = model(batch.tokens, batch.positions)
    changed = batch.tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 32
    after = model(changed, batch.positions)
    torch.testing.assert_close(after[:, :9], hidden[:, :9], rtol=0, atol=1e-5)
    assert (after[:, 9:] - hidden[:, 9:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("chunks", [[5, 1, 1, 1, 6, 1, 1, 1, 1, 1], [19]])
def test_cache_equals_recomputing(config, chunks):
    model, batch = make_model(config), make_batch(config, texts=((1, 2, 3),))
    tokens, positions = batch.tokens[:, : sum(chunks)], batch.positions[:, : sum(chunks)]
    expected = model(tokens, positions)
    cache = KVCache(config, torch.zeros(1, 24, dtype=torch.bool), dtype=torch.float32, device="cpu")
    pieces, start = [], 0
    for size in chunks:
        pieces.append(model(tokens[:, start : start + size], positions[:, start : start + size], cache))
        start += size
    assert cache.used == start
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-4)


def test_rotation_depends_on_distance_along_each_axis():
    model = Transformer(PRESETS["modern"])
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).unbind(0)

    def score(at, other):
        def turned(x, position):
            position = torch.tensor([[position]])
            tables = (model.angles_cos[position], model.angles_sin[position])
            cos, sin = (table.flatten(-2).unsqueeze(1) for table in tables)
            return rotate(x, (cos, sin))

        return (turned(q, at) * turned(k, other)).sum()

    torch.testing.assert_close(score((3, 5), (1, 4)), score((7, 9), (5, 8)))  # distance (2, 1) both times
    assert abs(score((3, 5), (1, 4)) - score((3, 5), (1, 5))) > 1e-3
    assert abs(score((3, 5), (1, 4)) - score((3, 5), (2, 4))) > 1e-3
    torch.testing.assert_close(score((4, 4), (4, 4)), (q * k).sum())


@pytest.mark.parametrize("alpha", [1.0, 32.0])
def test_relaxed_attention_is_attention_in_float32(alpha):
    q, k, v = torch.randn(3, 2, 4, 7, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(relaxed_attention(q, k, v, None, alpha, 0.0), expected)
    bias = torch.zeros(7, 7).masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(relaxed_attention(q, k, v, bias, alpha, 0.0), expected)


def test_relaxation_keeps_float16_from_overflowing():
    # scores are 64 * 120 * 120 / 8 = 115,200 times `sizes`: over the 65,504 of float16, and at most 3,600 over alpha 32
    sizes = torch.tensor([0.5, 0.9, 0.6, 1.0, 0.7])
    q = torch.full((1, 1, 5, 64), 120.0)
    k = sizes[:, None] * q
    v = torch.randn(1, 1, 5, 64, generator=torch.Generator().manual_seed(0)).half()
    expected = F.scaled_dot_product_attention(q, k, v.float(), is_causal=True)
    assert relaxed_attention(q.half(), k.half(), v, None, 1.0, 0.0).isnan().any()
    relaxed = relaxed_attention(q.half(), k.half(), v, None, 32.0, 0.0)
    torch.testing.assert_close(relaxed.float(), expected, rtol=0, atol=1e-3)


def test_logits_of_image_codes_are_a_part_of_all(config):
    model = make_model(config)
    hidden = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    full = model.logits(hidden)
    assert full.shape == (2, 3, config.vocabulary.padded_size)
    torch.testing.assert_close(model.logits(hidden, image_only=True), full[..., :32])


@pytest.mark.parametrize("image_softmax", ["codes", "full"])
def test_loss_is_the_weighted_mean_cross_entropy(config, image_softmax):
    config = dataclasses.replace(config, image_softmax=image_softmax)
    model, batch = make_model(config), make_batch(config)
    result = model.loss(batch)
    logits = model.logits(model(batch.tokens, batch.positions))
    if image_softmax == "codes":
        codes = torch.arange(logits.shape[-1]) < config.num_image_codes
        logits = logits.masked_fill(batch.image_mask[..., None] & ~codes, -torch.inf)
    losses = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view_as(batch.weights)
    torch.testing.assert_close(result["loss"], (losses * batch.weights).sum() / batch.weights.sum())
    torch.testing.assert_close(result["image_bits"], losses[batch.image_mask].mean() / math.log(2))
    text = (batch.weights > 0) & ~batch.image_mask
    torch.testing.assert_close(result["text_bits"], losses[text].mean() / math.log(2))


def test_padding_and_a_split_batch_do_not_change_the_loss():
    config = PRESETS["modern"]
    model, batch = make_model(config), make_batch(config)
    vocab, halves = config.vocabulary, []
    for i in range(2):
        end = int((batch.weights[i] > 0).sum())
        parts = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        # rows that draw, padded, of a model that reads no features; of no kind, as they were not drawn to learn from
        assert not any(parts.pop(name) for name in ("segments", "levels", "lengths", "features", "labels", "kind"))
        halves.append(type(batch)(**{name: part[i : i + 1, :end] for name, part in parts.items()}))
    assert halves[1].tokens.shape[1] < batch.tokens.shape[1]
    assert vocab.command("[PAD]") not in halves[1].tokens
    total = batch.weights.sum()
    summed = torch.stack([model.loss(half, total_weight=total)["loss"] for half in halves]).sum()
    torch.testing.assert_close(summed, model.loss(batch)["loss"])


def test_text_weight_0_leaves_the_image_loss():
    model = make_model(PRESETS["modern"])
    result = model.loss(make_batch(model.config, text_weight=0.0))
    torch.testing.assert_close(result["loss"] / math.log(2), result["image_bits"])
    assert result["text_bits"].isnan()


def test_bfloat16_loss_is_close(config):
    model, batch = make_model(config), make_batch(config)
    expected = model.loss(batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model.loss(batch)["loss"]
    pure = model.to(torch.bfloat16).loss(batch)["loss"]
    assert autocast.dtype == pure.dtype == torch.float32
    torch.testing.assert_close(autocast, expected, rtol=0.02, atol=0)
    torch.testing.assert_close(pure, expected, rtol=0.03, atol=0)
    assert model(batch.tokens, batch.positions).dtype == torch.bfloat16


def test_loss_falls_on_two_pictures(config):
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(config, dropout=0.05))
    batch = make_batch(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = model.loss(batch)["image_bits"]
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(batch)["loss"].backward()
        optimizer.step()
    assert first == pytest.approx(5.0, abs=0.3)  # 32 codes, nothing learned
    assert model.eval().loss(batch)["image_bits"] < 1.5


def test_gradients_reach_every_parameter(config):
    model = make_model(config)
    model.loss(make_batch(config))["loss"].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_saved_model_comes_back(config, tmp_path):
    config = dataclasses.replace(config, tokenizer_hash="ab" * 32, text_hash="cd" * 32)
    model, batch = make_model(config), make_batch(config)
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "config.json").read_text())["tokenizer_hash"] == "ab" * 32
    loaded = Transformer.from_pretrained(tmp_path)
    assert loaded.config == config
    assert isinstance(loaded.config, TransformerConfig)
    assert torch.equal(loaded(batch.tokens, batch.positions), model(batch.tokens, batch.positions))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads": 5}, "divide"),
        ({"width": 72, "heads": 12}, "multiple of 4"),
        ({"depth": 0}, "at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"pb_relax": -1.0}, "pb_relax"),
    ],
)
def test_impossible_configurations_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.modern(**{**SIZES, **overrides})
