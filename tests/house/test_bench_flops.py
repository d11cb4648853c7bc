"""The FLOP counts behind model-FLOPs utilisation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.speed.flops import measured_flops, peak_flops, real_tokens, training_flops
from generation.rows.describe import caption_row
from generation.rows.row import collate
from generation.transformer.model import Transformer
from tests.helpers.packed_rows import PRESETS, both, rows_of


@pytest.mark.parametrize("softmax", ["codes", "full"])
@pytest.mark.parametrize("preset", ["modern", "cogview"])
def test_flops_are_those_that_pytorch_counts(preset, softmax):
    config = replace(PRESETS[preset], image_softmax=softmax)
    rows = rows_of(config, count=1)
    batch = collate(config.vocabulary, rows)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        Transformer(config).loss(batch)["loss"].backward()
    flops = training_flops(config, batch)
    # PyTorch counts the whole square of scores, half of which a causal row does not need
    assert counter.get_total_flops() == flops.blocks + flops.head + 2 * flops.attention
    assert flops.total == flops.blocks + flops.attention + flops.head


def test_flops_count_no_padding():
    config = PRESETS["modern"]
    for describe in (False, True):
        padded, packed = both(config, describe)
        singles = [collate(config.vocabulary, [row]) for row in rows_of(config, describe)]
        assert training_flops(config, padded) == training_flops(config, packed)
        assert training_flops(config, padded).total == sum(training_flops(config, one).total for one in singles)
        assert real_tokens(config, padded) == packed.tokens.numel() == sum(one.tokens.numel() for one in singles)


def test_flops_of_a_row_that_describes_by_hand():
    config = replace(PRESETS["modern"], grid=(1, 1))
    row = caption_row(config.vocabulary, [[1, 2], [3]], torch.tensor([[5]]), config.max_text)
    # [SIZE] [BOI1] code [EOI1], then [ROI1] and 2 pieces, then [ROI1] and 1: 4 tokens all see, 3 and 2 alone
    pairs = 4**2 / 2 + 3 * (4 + 3 / 2) + 2 * (4 + 2 / 2)
    assert training_flops(config, collate(config.vocabulary, [row])).attention == 12 * 32 * 2 * pairs


def test_peak_of_known_and_unknown_devices(monkeypatch):
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda"), torch.bfloat16) == (peak, "table")
    peak, source = peak_flops(torch.device("cpu"), torch.float32)
    assert source == "measured"
    assert peak > 1e8
    assert measured_flops(torch.device("cpu"), torch.float32, size=64, runs=1) > 0
