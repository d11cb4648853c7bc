"""A part whose large tensors are stored in blocks of 8 bits: what is read back, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from vqvae.model import VQVAE, VQVAEConfig
from vqvae.storage.parts import ModelError, content_hash, load_part, pack_part, save_part


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_part(VQVAE(VQVAEConfig(channels=[16, 32], code_dim=8, codebook_size=1024)), tmp_path / "part")
    return tmp_path / "part"


def test_a_packed_part_is_half_as_large_and_nearly_the_same(folder):
    before, size = load_part(VQVAE, folder), (folder / "model.safetensors").stat().st_size
    pack_part(folder)
    after = load_part(VQVAE, folder)
    assert (folder / "model.safetensors").stat().st_size < 0.65 * size
    assert content_hash(load_part(VQVAE, folder)) == content_hash(after) != content_hash(before)
    for (name, old), new in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert new.dtype == old.dtype, name
        # half a step of the block's largest, and bfloat16's own rounding
        torch.testing.assert_close(new, old, atol=0.01 * float(old.float().abs().max()) + 1e-9, rtol=0.01)
    packed = [name for name in load_file(folder / "model.safetensors") if name.endswith(".eight_bit")]
    assert packed
    assert all(old.numel() < 4096 or f"{name}.eight_bit" in packed for name, old in before.state_dict().items())


def test_blocks_that_do_not_fit_are_one_line(folder):
    pack_part(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".eight_bit"))
    save_file({**tensors, name: tensors[name][:-1].clone()}, path)
    with pytest.raises(ModelError, match="blocks of shape"):
        load_part(VQVAE, folder)
    save_file({**tensors, "other.eight_bit": tensors[name].clone()}, path)
    with pytest.raises(ModelError, match=r"unexpected \['other.eight_bit'\]"):
        load_part(VQVAE, folder)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="truncated or damaged"):
        pack_part(folder)
