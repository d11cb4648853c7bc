"""The terms of a tokenizer's loss, its discriminator, and training with them."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data.config import ConfigError, load_config
from tests.helpers.stripes import stripe_shards, train_config
from tests.helpers.training import kept_tensors
from vqvae.discriminator import AdversarialConfig, PatchDiscriminator, hinge_loss
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.perceptual import PerceptualConfig, PerceptualDistance
from vqvae.storage.parts import ModelError, load_part, save_part
from vqvae.tokenizer_loss import ReconstructionLossConfig, TokenizerLoss, edge_error
from vqvae.train_tokenizer import TokenizerTrainConfig, start_from, train
from vqvae.training.config import TrainingError
from vqvae.trunk import Trunk, TrunkConfig, save_trunk

CPU = torch.device("cpu")
TINY = VQVAEConfig(channels=[8, 16], residual_blocks=1, code_dim=4, codebook_size=16)


def tiny(config=TINY):
    torch.manual_seed(0)
    return VQVAE(config).train()


def random_trunk():
    torch.manual_seed(1)
    return Trunk(TrunkConfig("test_efficientnet", num_classes=0))


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trunk") / "trunk"
    save_trunk(random_trunk(), folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return stripe_shards(tmp_path_factory.mktemp("shards"))


# the terms


def test_by_default_the_loss_is_squared_error_and_commitment():
    model, images = tiny(), torch.rand(2, 3, 16, 16)
    restored = model(images)
    loss = TokenizerLoss(ReconstructionLossConfig(), model.decoder.project.weight, CPU)
    terms = loss(restored, images)
    assert set(terms) == {"loss", "pixel_loss", "commitment"}
    assert torch.equal(terms["loss"], 16.0 * restored.pixel_loss + 0.25 * restored.commitment)
    assert loss.opponent is None


def test_edges_by_hand():
    original = torch.zeros(1, 1, 2, 3)
    original[..., 2] = 1.0  # an edge between the second and third column
    blurred = original.clone()
    blurred[..., 1] = 0.5
    # across, each row has differences 0, 1 and 0.5, 0.5: four errors of 0.5 over four places; down there is none
    assert float(edge_error(blurred, original)) == pytest.approx(0.25)
    assert float(edge_error(original + 0.25, original)) == 0.0


def test_perceptual_distance_by_its_formula(trunk):
    distance = PerceptualDistance.from_config(PerceptualConfig(str(trunk), 1.0, [2, 0]))
    images, originals = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    assert float(distance(originals, originals)) == 0.0
    network, expected = random_trunk().eval(), []
    with torch.no_grad():
        pairs = [network.forward_stages(network.normalise(x)) for x in (images, originals)]
    for found, wanted in zip(*pairs, strict=True):
        cosine = F.cosine_similarity(found, wanted, dim=1)
        expected.append(float((2 - 2 * cosine).mean()))  # |a - b|^2 of unit vectors
    assert float(distance(images, originals)) == pytest.approx((expected[0] + expected[2]) / 2, abs=1e-5)


def test_small_pictures_are_enlarged_for_the_trunk(trunk):
    small = torch.rand(1, 3, 16, 24)
    plain, enlarging = (
        PerceptualDistance.from_config(PerceptualConfig(str(trunk), 1.0, [0], size)) for size in (0, 32)
    )
    assert plain._features(small)[0].shape[-2:] == (8, 12)
    assert enlarging._features(small)[0].shape[-2:] == (16, 24)


def test_pictures_become_alike_by_the_distance(trunk):
    distance = PerceptualDistance.from_config(PerceptualConfig(str(trunk), 1.0, [0, 1]))
    original = torch.rand(1, 3, 16, 16)
    image = nn.Parameter(torch.full_like(original, 0.5))
    optimizer = torch.optim.Adam([image], lr=0.05)
    values = []
    for _ in range(20):
        loss = distance(image, original)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.5 * values[0]
    assert all(parameter.grad is None for parameter in distance.parameters())


# the adversarial term


def test_hinge_by_hand():
    assert float(hinge_loss(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0]))) == pytest.approx(0.5 * (0.5 + 1.0))


@pytest.mark.parametrize(("layers", "side"), [(1, 16), (3, 4)])
def test_scores_are_of_patches(layers, side):
    assert PatchDiscriminator(8, layers)(torch.rand(2, 3, 32, 32)).shape == (2, 1, side, side)


def adversarial_loss(model, **changes):
    config = ReconstructionLossConfig(
        edge_weight=1.0, adversarial=AdversarialConfig(start=0, channels=8, layers=2, **changes)
    )
    return TokenizerLoss(config, model.decoder.project.weight, CPU)


def test_the_adaptive_weight_is_that_of_the_paper():
    model, images = tiny(), torch.rand(2, 3, 16, 16)
    model(images)  # draws the codebook
    model.eval()
    loss = adversarial_loss(model, weight=0.7, adaptive=True)
    terms = loss(model(images), images)
    terms["loss"].backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in loss.opponent.model.parameters())

    model.zero_grad()
    restored, last = model(images), model.decoder.project.weight
    others = 16.0 * restored.pixel_loss + edge_error(restored.images, images)
    made = -loss.opponent.model(restored.images).mean()
    norms = [torch.autograd.grad(one, last, retain_graph=True)[0].norm() for one in (others, made)]
    total = others + 0.7 * (norms[0] / (norms[1] + 1e-4)).detach() * made + 0.25 * restored.commitment
    total.backward()
    torch.testing.assert_close(terms["loss"], total)
    torch.testing.assert_close(found, [parameter.grad for parameter in model.parameters()])


def test_the_term_counts_from_its_start_and_the_discriminator_learns_before():
    model, images = tiny(), torch.rand(2, 3, 16, 16)
    loss = adversarial_loss(model, weight=1.0)
    loss.config.adversarial.start = 1000
    for step, learns, counts in ((799, False, False), (800, True, False), (1000, True, True)):
        loss.step = step
        assert ("adversarial" in loss(model(images), images)) == counts
        judged = loss.opponent.loss_of(loss.opponent.model)
        assert (judged is not None) == learns
    assert loss.opponent.loss_of(loss.opponent.model) is None  # a batch is learned from once


# training


def config_of(shards, out, trunk=None, **loop):
    steps = {"steps": 6, "batch_size": 4, "log_every": 1, "eval_every": 6, "save_every": 3}
    config = train_config(shards, out, {"test_pictures": 4}, **{**steps, **loop})
    config.model = TINY
    config.adversarial = AdversarialConfig(weight=0.5, adaptive=True, start=2, channels=8, layers=2)
    if trunk is not None:
        config.perceptual = PerceptualConfig(str(trunk), 1.0, [0, 1])
    return config


def test_training_with_every_term(shards, trunk, tmp_path):
    folder = train(config_of(shards, tmp_path / "run", trunk, accumulate=2))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"train/opponent", "train/adversarial", "train/perceptual"} <= log[-2].keys()
    assert "train/adversarial" not in log[0]
    steps = [value for name, value in kept_tensors(tmp_path / "run").items() if name.endswith("/step")]
    assert steps
    assert all(int(value) == 6 for value in steps)
    assert load_part(VQVAE, folder).state_dict().keys() == VQVAE(TINY).state_dict().keys()


def test_resuming_half_way_is_the_whole_way(shards, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    import vqvae.training.loop as loop_module

    whole = train(config_of(shards, tmp_path / "whole"))
    original = loop_module.Loop._advance

    def stop(self, seconds):
        if self.progress.step == 4:
            raise Stopped
        original(self, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module.Loop, "_advance", stop)
        with pytest.raises(Stopped):
            train(config_of(shards, tmp_path / "parts"))
    parts = train(config_of(shards, tmp_path / "parts"), resume=True)
    models = [load_part(VQVAE, folder).state_dict() for folder in (whole, parts)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    states = [kept_tensors(tmp_path / run) for run in ("whole", "parts")]
    assert any(name.startswith("opponent/model/") for name in states[0])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_checkpoint_without_an_opponent_is_one_line(shards, tmp_path):
    config = config_of(shards, tmp_path / "run")
    config.adversarial = AdversarialConfig()
    train(config)
    with pytest.raises(TrainingError, match="holds no opponent") as error:
        train(config_of(shards, tmp_path / "run", steps=8), resume=True)
    assert "\n" not in str(error.value)


def test_training_starts_from_another_tokenizer(shards, tmp_path):
    trained = tiny()
    save_part(trained, tmp_path / "trained", torch.float32)
    larger = tiny(VQVAEConfig(channels=[8, 16], residual_blocks=2, code_dim=4, codebook_size=32))
    names = start_from(larger, trained)
    assert "encoder.down.0.weight" in names
    assert not any(name.startswith("quantizer.") for name in names)  # another number of codes
    assert torch.equal(larger.encoder.down[0].weight, trained.encoder.down[0].weight)
    assert "quantizer.codebook" in start_from(tiny(), trained)
    with pytest.raises(ModelError, match="no weight of that tokenizer's encoder"):
        start_from(tiny(VQVAEConfig(channels=[6], residual_blocks=0, code_dim=2, codebook_size=8)), trained)
    config = config_of(shards, tmp_path / "run", steps=1)
    config.init = str(tmp_path / "missing")
    with pytest.raises(ModelError, match="neither a folder"):
        train(config)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("perceptual.weight=1", "perceptual.weight needs perceptual.trunk"),
        ("adversarial.channels=12", "multiple of 8"),
        ("adversarial.weight=-1", "adversarial"),
        ("perceptual.unknown=1", "unknown key perceptual.unknown"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(override, problem):
    with pytest.raises(ConfigError, match=problem) as error:
        load_config(TokenizerTrainConfig, None, [override])
    assert "\n" not in str(error.value)


def test_a_stage_that_the_trunk_lacks(trunk):
    with pytest.raises(ValueError, match=r"stages must lie in 0\.\.\d"):
        PerceptualDistance.from_config(PerceptualConfig(str(trunk), 1.0, [9]))
