"""Augmentations of a judge's pictures: off, they draw nothing; on, each is decided by its seed."""

import random

import pytest
import torch

from data.config import ConfigError
from data.sample import Caption, Sample
from retrieval.training.damage import PictureDamage
from retrieval.training.pairs import AugmentConfig, mirror
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.storage.parts import ModelError, save_part

CPU = torch.device("cpu")


def pictures(count=6, side=34):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def test_nothing_happens_by_default():
    pixels, drawing = pictures(), generator()
    before = drawing.get_state()
    assert PictureDamage(AugmentConfig(), CPU)(pixels, drawing) is pixels
    assert torch.equal(drawing.get_state(), before)
    rng = random.Random(1)
    state = rng.getstate()
    assert mirror(pixels, [], 0.0, rng) is pixels
    assert rng.getstate() == state


@pytest.mark.parametrize("name", ["blur", "noise", "jpeg"])
def test_each_damage_changes_the_pictures_it_is_drawn_for(name):
    pixels = pictures(40)
    config = AugmentConfig()
    setattr(config, name, 0.5)
    damage = PictureDamage(config, CPU)
    found = damage(pixels, generator())
    changed = (found != pixels).flatten(1).any(dim=1)
    assert 8 <= int(changed.sum()) <= 32
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert torch.equal(damage(pixels, generator()), found)
    assert not torch.equal(damage(pixels, generator(2)), found)
    if name == "blur":  # neighbours come nearer
        assert (found.diff(dim=3).abs().mean() < pixels.diff(dim=3).abs().mean()).item()


def test_reconstructions_are_the_tokenizers(tmp_path):
    torch.manual_seed(0)
    config = VQVAEConfig(channels=[8, 8], residual_blocks=1, code_dim=4, codebook_size=16)
    save_part(VQVAE(config), tmp_path / "tokenizer", torch.float32)
    settings = AugmentConfig(reconstructed=1.0, reconstructions=[str(tmp_path / "tokenizer")])
    damage = PictureDamage(settings, CPU)
    pixels = pictures(3, side=32)
    tokenizer = damage.tokenizers[0]
    assert not tokenizer.training
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    torch.testing.assert_close(damage(pixels, generator()), tokenizer.decode(tokenizer.encode(pixels)))
    assert damage(pictures(2, side=34), generator()).shape == (2, 3, 34, 34)  # no multiple of the stride


def test_reconstructions_need_a_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match="reconstructions"):
        AugmentConfig(reconstructed=0.5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="not complete"):
        PictureDamage(AugmentConfig(reconstructed=0.5, reconstructions=[str(tmp_path / "empty")]), CPU)


def test_what_has_a_direction_is_not_mirrored():
    pixels = pictures(3)
    names = ("cat", "left arrow", "three o'clock")
    samples = [Sample(name, b"", "png", {"en": Caption(name)}) for name in names]
    found = mirror(pixels, samples, 1.0, random.Random(0))
    assert torch.equal(found[0], pixels[0].flip(2))
    assert torch.equal(found[1:], pixels[1:])
