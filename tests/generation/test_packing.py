import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from generation.rows.row import RowBatch, collate, pack
from generation.transformer.attention import DenseAttention
from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer
from generation.transformer.packing import make_packing, packed_attention, varlen_packing
from tests.helpers.packed_rows import PRESETS, SIZES, both, rows_of


def loss_and_gradients(model: Transformer, batch: RowBatch) -> tuple[dict[str, Tensor], list[Tensor]]:
    model.zero_grad()
    losses = model.loss(batch)
    losses["loss"].backward()
    return losses, [gradient.clone() for parameter in model.parameters() if (gradient := parameter.grad) is not None]


# layout


def test_packing_leaves_the_padding_out():
    config = PRESETS["modern"]
    padded, packed = both(config)
    real = padded.tokens != config.vocabulary.command("[PAD]")
    assert not real.all()
    assert packed.tokens.shape == (1, int(real.sum()))
    assert packed.lengths == tuple(real.sum(dim=1).tolist())
    for name in ("tokens", "targets", "positions", "image_mask", "weights"):
        assert torch.equal(getattr(packed, name)[0], getattr(padded, name)[real]), name
    assert packed.to("cpu").lengths == packed.lengths
    with pytest.raises(ValueError, match="at least one row"):
        pack(config.vocabulary, [])


# the model


@pytest.mark.parametrize("describe", [False, True], ids=["draw", "describe"])
@pytest.mark.parametrize("preset", ["modern", "cogview", "pb_relax"])
def test_packed_rows_have_the_losses_and_gradients_of_padded_ones(preset, describe):
    torch.manual_seed(0)
    model = Transformer(PRESETS[preset])
    padded, packed = both(model.config, describe)
    losses, gradients = loss_and_gradients(model, padded)
    again, gradients_again = loss_and_gradients(model, packed)
    for name, value in losses.items():
        torch.testing.assert_close(again[name], value, equal_nan=True)
    for expected, found in zip(gradients, gradients_again, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_packed_row_sees_no_other():
    torch.manual_seed(0)
    model = Transformer(PRESETS["modern"]).eval()
    rows = rows_of(model.config)
    other = replace(rows[0], tokens=rows[0].tokens.flip(0))
    hidden = []
    for first in (rows[0], other):
        batch = pack(model.config.vocabulary, [first, *rows[1:]])
        hidden.append(model(batch.tokens, batch.positions, lengths=batch.lengths)[0])
    end = len(rows[0].tokens)
    assert not torch.allclose(hidden[0][:end], hidden[1][:end])
    assert torch.equal(hidden[0][end:], hidden[1][end:])
    alone = collate(model.config.vocabulary, [rows[1]])
    expected = model(alone.tokens, alone.positions)[0]
    torch.testing.assert_close(hidden[0][end : end + len(expected)], expected)


def test_packed_rows_are_dense_where_padded_ones_are_sparse():
    torch.manual_seed(0)
    sparse = Transformer(PRESETS["sparse"])
    dense = Transformer(PRESETS["cogview"])
    dense.load_state_dict(sparse.state_dict())
    _, packed = both(sparse.config)
    torch.testing.assert_close(sparse.loss(packed)["loss"], dense.loss(packed)["loss"])


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_gradient(packing, dropout):
    found, kept = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Transformer(replace(PRESETS["modern"], dropout=dropout))
        if checkpointing:
            model.checkpoint_gradients()
        batch = both(model.config)[packing]
        torch.manual_seed(1)
        sizes: dict[int, int] = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = model.loss(batch)
        losses["loss"].backward()
        kept.append(sum(sizes.values()))
        found.append([losses["loss"].detach(), *(parameter.grad for parameter in model.parameters())])
    for expected, again in zip(*found, strict=True):
        torch.testing.assert_close(again, expected)
    assert kept[1] < 0.7 * kept[0]


# kernels


class FakeMask:
    """xformers' `BlockDiagonalCausalMask`, as far as its documentation tells."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    @classmethod
    def from_seqlens(cls, lengths: list[int]) -> "FakeMask":
        return cls(lengths)


def fake_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: FakeMask) -> Tensor:
    """[1, T, H, d] with a mask of all tokens, instead of block by block."""
    number = torch.arange(len(attn_bias.lengths)).repeat_interleave(torch.tensor(attn_bias.lengths))
    assert q.shape[1] == len(number)
    mask = (number[:, None] == number[None]).tril()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def test_xformers_is_given_its_layout_and_mask(monkeypatch):
    operators = SimpleNamespace(memory_efficient_attention=fake_attention)
    masks = SimpleNamespace(BlockDiagonalCausalMask=FakeMask)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "xformers.ops", operators)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha.attn_bias", masks)
    monkeypatch.setattr("generation.transformer.packing._installed", lambda module: True)
    lengths = (3, 7, 1)
    packing = make_packing(lengths, torch.device("cuda"), torch.bfloat16)
    assert (packing.kernel, packing.mask.lengths) == ("xformers", [3, 7, 1])
    q, k, v = torch.randn(3, 1, 2, 11, 8)
    attend = DenseAttention(PRESETS["modern"]).eval()
    found = packed_attention(q, k, v, packing, attend)
    by_rows = make_packing(lengths, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(found, packed_attention(q, k, v, by_rows, attend))


def test_pytorch_is_given_its_layout_and_offsets(monkeypatch):
    """`varlen_attn` runs on CUDA alone: here a stand-in that follows its documentation."""

    def varlen(q, k, v, starts, starts_again, longest, longest_again, *, window_size):
        assert starts is starts_again
        assert starts.dtype == torch.int32
        assert longest == longest_again >= int(starts.diff().max())
        assert window_size == (-1, 0)
        mixed = torch.empty_like(q)
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            row = [x[start:end].transpose(0, 1) for x in (q, k, v)]
            mixed[start:end] = F.scaled_dot_product_attention(row[0], row[1], row[2], is_causal=True).transpose(0, 1)
        return mixed

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    lengths = (3, 7, 1)
    q, k, v = torch.randn(3, 1, 2, 11, 8)
    attend = DenseAttention(PRESETS["modern"]).eval()
    found = packed_attention(q, k, v, varlen_packing(lengths, torch.device("cpu")), attend)
    by_rows = make_packing(lengths, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(found, packed_attention(q, k, v, by_rows, attend))
    assert varlen_packing((128, 129), torch.device("cpu")).longest == 256


def test_kernels_are_chosen_by_what_they_can_do(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr("generation.transformer.packing._installed", lambda module: False)
    assert make_packing([2, 3], cuda, torch.bfloat16).kernel == "rows"
    monkeypatch.setattr("generation.transformer.packing._installed", lambda module: True)
    assert make_packing([2, 3], cpu, torch.bfloat16).kernel == "rows"
    assert make_packing([2, 3], cuda, torch.bfloat16, plain=False).kernel == "rows"
    assert make_packing([2], cuda, torch.bfloat16, biases=[torch.zeros(1, 1, 2, 2)]).kernel == "rows"
    monkeypatch.setattr("generation.transformer.packing._installed", lambda module: module != "xformers")
    assert make_packing([2, 3], cuda, torch.float32).kernel == "rows"


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_take_packed_rows(checkpointing):
    torch.manual_seed(0)
    model = Transformer(PRESETS["modern"])
    batches = [both(model.config, describe) for describe in (False, True)]
    expected = [loss_and_gradients(model, padded) for padded, _ in batches]
    if checkpointing:
        model.checkpoint_gradients()
    for block in model.blocks:
        block.compile(dynamic=True)
    for (losses, gradients), (_, packed) in zip(expected, batches, strict=True):
        again, gradients_again = loss_and_gradients(model, packed)
        torch.testing.assert_close(again["loss"], losses["loss"])
        for one, other in zip(gradients, gradients_again, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("describe", [False, True], ids=["draw", "describe"])
def test_packed_rows_on_a_gpu(describe):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.modern(**{**SIZES, "heads": 1}, grid=(4, 4))).cuda()
    batches = [batch.to("cuda") for batch in both(model.config, describe)]
    with torch.autocast("cuda", torch.bfloat16):
        (losses, expected), (again, found) = (loss_and_gradients(model, batch) for batch in batches)
    torch.testing.assert_close(again["loss"], losses["loss"], rtol=1e-2, atol=1e-2)
    for one, other in zip(expected, found, strict=True):
        assert float((one - other).norm()) <= 0.05 * float(one.norm()) + 1e-4
